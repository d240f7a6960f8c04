"""Uploading, with a hub that is not there."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from rto_lightning.cli import main
from rto_lightning.export import hub
from tests.roles import save_random_role

FORBIDDEN: Any = SimpleNamespace(status_code=403, headers={}, request=None)


class Hub:
    """Records what it is asked, or raises."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repo_id: str, **options: Any) -> str:
        if self.error is not None:
            raise self.error
        self.calls.append((repo_id, options))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, repo_id: str, folder_path: Path, **options: Any) -> None:
        self.calls.append((repo_id, {"files": sorted(path.name for path in Path(folder_path).iterdir())}))


@pytest.fixture
def connect(models, place, monkeypatch):
    """A role of mode full, someone who is logged in, and a hub that may raise."""
    save_random_role(models["tied"], Path("role"), "policy", mode="full")
    monkeypatch.setattr(hub, "get_token", lambda: "token")

    def connected(error: Exception | None = None) -> Hub:
        made = Hub(error)
        monkeypatch.setattr(hub, "HfApi", lambda: made)
        return made

    return connected


def test_the_whole_folder_is_uploaded(connect, capsys):
    connected = connect()
    assert main(["export", "role", "out", "--push_to_hub", "me/model", "--private"]) == 0
    assert connected.calls[0] == ("me/model", {"private": True, "exist_ok": True})
    assert connected.calls[1] == ("me/model", {"files": sorted(path.name for path in Path("out").iterdir())})
    assert 'from_pretrained("me/model"' in Path("out/README.md").read_text()
    assert "uploaded to me/model" in capsys.readouterr().out


def test_without_a_login_nothing_is_done(connect, fails, monkeypatch):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    assert "needs a login on the Hugging Face hub; run `hf auth login`" in fails("role", "out", "--push_to_hub", "me/m")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (LocalTokenNotFoundError("no token"), "nobody is logged in on the Hugging Face hub; run `hf auth login`"),
        (
            HfHubHTTPError("Forbidden", response=FORBIDDEN),
            "token that may write",
        ),
        (ConnectionError("no route"), "the hub did not take me/m (no route); then run `hf upload me/m out`"),
    ],
)
def test_a_refused_upload_leaves_the_export(connect, fails, error, words):
    connect(error)
    message = fails("role", "out", "--push_to_hub", "me/m")
    assert words in message and "The export is in out" in message
    assert Path("out/README.md").exists()


@pytest.mark.parametrize("name", ["model", "a/b/c", "me/mo del"])
def test_names_that_are_none(connect, fails, name):
    assert "give it as USER/NAME" in fails("role", "out", "--push_to_hub", name)


def test_an_adapter_on_a_local_base_is_not_published(models, connect, fails):
    save_random_role(models["tied"], Path("adapter"), "policy")
    assert "which others do not have" in fails("adapter", "out", "--push_to_hub", "me/m")
