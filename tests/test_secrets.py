"""Secrets in settings, texts and variables; `tests/faults/test_trust_in_runs.py` searches what a run leaves."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rto_lightning.cli.pipeline_records import stage_inputs
from rto_lightning.cli.pipeline_settings import StageSettings
from rto_lightning.errors import UserError
from rto_lightning.secrets import (
    MASK,
    check_not_masked,
    is_secret_name,
    mask_output,
    mask_settings,
    mask_text,
    mask_yaml,
)

CANARY = "Canary-0123456789"


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "DB_PASSWORD",
        "apiKey",
        "api-key",
        "model.init_args.api_key",
        "token",
        "hub_token",
        "Authorization",
        "X-Api-Key",
        "client_secret",
        "private_key",
        "SLACK_WEBHOOK_URL",
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "max_new_tokens",
        "tokenizer",
        "pad_token",
        "eos_token",
        "stop_token_ids",
        "token_reward_clip",
        "logprob_chunk_tokens",
        "PWD",
        "key",
        "keys",
        "monkey",
        "TOKENIZERS_PARALLELISM",
        "model.backbone.model",
        "granularity",
        "SSH_AUTH_SOCK",
        "secretary",
    ],
)
def test_other_names(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("at https://user:pw@host/path", f"at https://{MASK}@host/path"),
        ("at postgres://u:p@db:5432/x", f"at postgres://{MASK}@db:5432/x"),
        ("https://host/x?token=abc&page=2", f"https://host/x?token={MASK}&page=2"),
        ("https://host/x?page=2&X-Amz-Signature=abc#top", f"https://host/x?page=2&X-Amz-Signature={MASK}#top"),
        ("Authorization: Bearer abcdefgh1234", f"Authorization: Bearer {MASK}"),
        ("{'Authorization': 'Basic abcdefgh1234'}", f"{{'Authorization': 'Basic {MASK}'}}"),
        ("--model.api_key=abcdefgh1234 refused", f"--model.api_key={MASK} refused"),
        ("api_key: 'abcdefgh1234'", f"api_key: '{MASK}'"),
        (f"found {CANARY}!", f"found {MASK}!"),
        ("/data?x=Canary%20%26", "/data?x=Canary%20%26"),
        ("the next token: something", "the next token: something"),
        ("mail a@b.org about http://host/a@b", "mail a@b.org about http://host/a@b"),
    ],
)
def test_texts(text: str, masked: str) -> None:
    assert mask_text(text, {"MY_TOKEN": CANARY, "OTHER_TOKEN": "true", "HOME": "/data"}) == masked


@settings(deadline=None)
@given(st.text(), st.text(min_size=8), st.text())
def test_no_text_holds_the_value_of_a_secret_variable(before: str, value: str, after: str) -> None:
    assert value in MASK or value not in mask_text(before + value + after, {"A_TOKEN": value}).replace(MASK, "\0")


def test_settings_keep_their_structure() -> None:
    given: dict[str, Any] = {
        "logger": {"init_args": {"api_key": CANARY, "password": 12345678, "offline": True}},
        "headers": [{"Authorization": f"Bearer {CANARY}"}, {"secrets": {"a": "x", "b": [None, 1, ""]}}],
        "max_new_tokens": 64,
        "pad_token": "<|pad|>",
        "token": None,
    }
    masked = mask_settings(given, {})
    assert masked["logger"]["init_args"] == {"api_key": MASK, "password": MASK, "offline": True}
    assert masked["headers"] == [{"Authorization": MASK}, {"secrets": {"a": MASK, "b": [None, MASK, ""]}}]
    assert (masked["max_new_tokens"], masked["pad_token"], masked["token"]) == (64, "<|pad|>", None)
    assert mask_settings(masked, {}) == masked


def test_yaml_without_secrets_stays_as_it_is() -> None:
    text = "# header\na: 1.0e-05\nb: [x, 'y']  # note\n"
    assert mask_yaml(text) == text
    masked = mask_yaml(f"# header\na: 1.0e-05\napi_key: {CANARY}\n")
    assert masked == f"# header\na: 1.0e-05\napi_key: {MASK}\n"


def test_a_masked_setting_is_told_when_it_is_used() -> None:
    check_not_masked({"a": [1, {"b": "x"}]})
    with pytest.raises(UserError, match=r"^trainer\.logger\.api_key is a secret that was masked .*; set it again"):
        check_not_masked({"trainer": {"logger": [{"other": 1}, {"api_key": MASK}]}}, "")


def test_records_of_a_pipeline(tmp_path: Path) -> None:
    stage = StageSettings("first", run="module:function", arguments={"hub_token": CANARY, "steps": 3})
    assert stage_inputs(stage, 1, tmp_path, {})["arguments"] == {"hub_token": MASK, "steps": 3}


def test_log_records_and_tracebacks(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("MY_TOKEN", CANARY)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    factory = logging.getLogRecordFactory()
    try:
        mask_output()
        mask_output()
        logging.getLogger("a.library").warning("sent %s to %s", CANARY, "there")
    finally:
        logging.setLogRecordFactory(factory)
    assert caplog.messages == [f"sent {MASK} to there"]
    program = f"from rto_lightning.secrets import mask_output\nmask_output()\nraise ValueError('bad {CANARY}')"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stderr
    assert f"ValueError: bad {MASK}" in shown and CANARY not in shown
