"""Keeps secrets out of what is printed and written: by the names of settings and variables, and by their form.

Masked are

- settings whose name says what they are (`api_key`, `hub_token`, `password`), whatever they hold;
- credentials in addresses (`https://user:password@host`, `?token=...`) and in `Authorization` headers;
- the values of environment variables whose name says what they are (`HF_TOKEN`, `WANDB_API_KEY`), wherever they stand.
"""

import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import yaml

from rto_lightning.errors import UserError

MASK = "<masked>"
"""Stands where a secret was."""

SHORTEST = 8
"""Characters of a value that is looked for in texts: shorter ones stand in many words by chance."""

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SECRET_WORDS = {"apikey", "authorization", "credential", "credentials", "passphrase", "passwd", "password", "secret"}
_SECRET_WORDS |= {"secrets", "webhook"}
_SECRET_KEYS = {"access", "api", "auth", "encryption", "private", "signing"}
# Tokens of a vocabulary, which are no secrets.
_PLAIN_TOKENS = {
    "bos",
    "cls",
    "end",
    "eos",
    "image",
    "mask",
    "next",
    "pad",
    "per",
    "sep",
    "special",
    "start",
    "stop",
    "unk",
}

_USER_OF_ADDRESS = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@'\"]+@", re.IGNORECASE)
_HEADER = re.compile(r"(?i)(\bauthorization['\"]?\s*[:=]\s*['\"]?(?:basic|bearer|token)?\s*|\bbearer\s+)[\w.~+/=-]{8,}")
_ASSIGNED = re.compile(r"([\w.-]+)(['\"]?\s*[=:]\s*['\"]?)([^\s'\",;&#<>]{8,})")
_QUERY = re.compile(r"([?&;])([\w.-]+)=([^&;#\s'\"]+)")
_SIGNATURES = {"key", "sig", "signature", "x-amz-signature", "x-goog-signature"}


def is_secret_name(name: str) -> bool:
    """Whether a setting, a variable or a parameter of an address is a secret, by its name."""
    words = [word.lower() for word in _WORDS.findall(name)]
    if not _SECRET_WORDS.isdisjoint(words):
        return True
    before, last = (words[-2] if len(words) > 1 else ""), (words[-1] if words else "")
    return (last == "key" and before in _SECRET_KEYS) or (last == "token" and before not in _PLAIN_TOKENS)


def mask_text(text: str, environ: Mapping[str, str] | None = None) -> str:
    """A text without the secrets in it.

    Args:
        text: such as an error message.
        environ: variables whose values are looked for; None takes those of the process.
    """
    for value in _secret_values(os.environ if environ is None else environ):
        text = text.replace(value, MASK)
    text = _USER_OF_ADDRESS.sub(rf"\1{MASK}@", text)
    text = _QUERY.sub(_without_parameter, text)
    text = _HEADER.sub(rf"\1{MASK}", text)
    return _ASSIGNED.sub(_without_assigned, text)


def mask_settings(settings: Any, environ: Mapping[str, str] | None = None) -> Any:
    """Settings without the secrets in them, of the same structure.

    Args:
        settings: mappings, lists and scalars.
        environ: as for :func:`mask_text`.
    """
    if isinstance(settings, Mapping):
        return {
            key: _mask_all(value) if is_secret_name(str(key)) else mask_settings(value, environ)
            for key, value in settings.items()
        }
    if isinstance(settings, list | tuple):
        return [mask_settings(value, environ) for value in settings]
    return mask_text(settings, environ) if isinstance(settings, str) else settings


def mask_yaml(text: str, environ: Mapping[str, str] | None = None) -> str:
    """Settings as YAML without the secrets in them; the very same text if there are none."""
    settings = yaml.safe_load(text)
    masked = mask_settings(settings, environ)
    if masked == settings:
        return text
    header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    dumped: str = yaml.safe_dump(masked, sort_keys=False)
    return header + dumped


def check_not_masked(settings: Any, key: str = "") -> None:
    """Refuse settings from a file in which secrets were masked.

    Args:
        settings: mappings, lists and scalars.
        key: under which they stand.

    Raises:
        UserError: with the first key whose value is missing.
    """
    if isinstance(settings, Mapping):
        for name, value in settings.items():
            check_not_masked(value, f"{key}.{name}" if key else str(name))
    elif isinstance(settings, list | tuple):
        for value in settings:
            check_not_masked(value, key)
    elif isinstance(settings, str) and MASK in settings:
        raise UserError(
            f"{key} is a secret that was masked when these settings were saved; set it again, on the command line or "
            "in a file that is yours alone."
        )


def mask_output() -> None:
    """From now on, log records and the traceback of an exception that nobody catches have their secrets masked."""
    factory = logging.getLogRecordFactory()
    if getattr(factory, "masks_secrets", False):
        return

    def make_record(*args: Any, **options: Any) -> logging.LogRecord:
        record = factory(*args, **options)
        try:
            record.msg, record.args = mask_text(record.getMessage()), ()
        except Exception:  # a message that does not fit its arguments: logging itself says so
            return record
        return record

    make_record.masks_secrets = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make_record)
    sys.excepthook = _print_masked


def _print_masked(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    sys.stderr.write(mask_text("".join(traceback.format_exception(kind, error, trace))))


def _secret_values(environ: Mapping[str, str]) -> list[str]:
    """Values to look for, as they are and as addresses and JSON write them, the longest first."""
    values = [value for name, value in environ.items() if len(value) >= SHORTEST and is_secret_name(name)]
    forms = {form for value in values for form in (value, quote(value, safe=""), json.dumps(value)[1:-1])}
    return sorted(forms, key=len, reverse=True)


def _mask_all(value: Any) -> Any:
    """What stands under a secret name: every text and number of it."""
    if isinstance(value, Mapping):
        return {key: _mask_all(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_mask_all(entry) for entry in value]
    return value if value is None or isinstance(value, bool) or value == "" else MASK


def _without_parameter(match: re.Match[str]) -> str:
    before, name, _ = match.groups()
    secret = is_secret_name(name) or name.lower() in _SIGNATURES
    return f"{before}{name}={MASK}" if secret else match[0]


def _without_assigned(match: re.Match[str]) -> str:
    # A bare `token:` is more often a word of a sentence than a name.
    name, between, _ = match.groups()
    is_word = name.lower() == "token" and "=" not in between
    return f"{name}{between}{MASK}" if is_secret_name(name) and not is_word else match[0]
