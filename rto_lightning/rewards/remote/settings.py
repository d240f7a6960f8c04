"""How an HTTP reward service is asked. Nothing here opens a connection."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import httpx2

from rto_lightning.errors import UserError, check_settings

_WHERE = "model.reward_service"
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)


@dataclass(frozen=True)
class RewardServiceSettings:
    """How an HTTP reward service is asked; read only with `reward_url`. Each device asks about its own responses."""

    batch_size: int = 16
    """Responses in one request."""
    concurrency: int = 8
    """Requests that wait for an answer at a time."""
    connect_timeout: float = 10.0
    """Seconds within which a connection must be made."""
    answer_timeout: float = 300.0
    """Seconds within which a request must be answered to the end; then it is made again."""
    patience: float = 600.0
    """Seconds, from its first attempt, for which a request is made again while no service can be reached or those that
    can are busy or broken (status 408, 425, 429, 5xx); then the run ends. Other devices wait meanwhile: stay below
    their time-out, which is 30 minutes in Lightning."""
    token_variable: str | None = None
    """Name of the environment variable that holds the bearer token of the service; null sends none. The token itself
    belongs into no configuration."""
    trust_env: bool = False
    """Use the proxies and certificates that environment variables name (HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE)."""

    def __post_init__(self) -> None:
        """Raise UserError for values that no run can use."""
        check_settings(
            _WHERE, self, ("batch_size", "concurrency", "connect_timeout", "answer_timeout"), not_negative=("patience",)
        )
        if self.token_variable is not None:
            check_variable(self.token_variable, f"{_WHERE}.token_variable")

    def token(self) -> str | None:
        """The bearer token, if one is to be sent; UserError as :func:`token_of`."""
        return None if self.token_variable is None else token_of(self.token_variable, f"{_WHERE}.token_variable")


def check_variable(name: str, setting: str) -> None:
    """Raise UserError, which does not repeat it, unless `name` can be that of an environment variable."""
    if not _VARIABLE.fullmatch(name):
        raise UserError(f"{setting} is no name of an environment variable; put the token into one, and its name here.")


def token_of(variable: str, setting: str) -> str:
    """The bearer token in an environment variable.

    Raises:
        UserError: if it is not set, can be none, or holds what no HTTP header can carry.
    """
    check_variable(variable, setting)
    token = os.environ.get(variable, "").strip()
    if not token:
        raise UserError(f"{setting} names the environment variable {variable}, which is not set; set it to the token.")
    if not (token.isascii() and token.isprintable()):
        raise UserError(
            f"the token in the environment variable {variable} holds other characters than printable ASCII."
        )
    return token


def service_urls(given: str | Sequence[str]) -> list[httpx2.URL]:
    """The addresses that `reward_url` holds.

    Raises:
        UserError: if there is none, one is no HTTP address, or one holds a password, which a saved configuration would
            show.
    """
    urls = []
    for text in [given] if isinstance(given, str) else given:
        try:
            url = httpx2.URL(text)
        except (httpx2.InvalidURL, TypeError):
            url = httpx2.URL()
        if url.scheme not in ("http", "https") or not url.host:  # not repeated: it may hold a password all the same
            raise UserError("the address of the reward service is no HTTP address; write http://HOST:PORT/PATH.")
        if url.userinfo:
            raise UserError(
                f"the reward service's address {shown_url(url)} holds a user name or password; put a token into an "
                "environment variable and give the name of that."
            )
        urls.append(url)
    if not urls:
        raise UserError("the addresses of reward services are an empty list; name one, or set it to null.")
    return urls


def shown_url(url: httpx2.URL) -> str:
    """An address without what may be secret: user name, password, query."""
    return str(url.copy_with(userinfo=b"", query=None, fragment=None))
