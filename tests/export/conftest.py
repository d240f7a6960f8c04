"""Base models of several architectures."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import write_tiny_model, write_tiny_neox, write_tiny_qwen2


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Llama with tied and with untied embeddings, in bfloat16, Qwen2 (tied, biases) and GPT-NeoX (no chat template)."""
    folder = tmp_path_factory.mktemp("bases")
    made: dict[str, Path] = {
        "tied": write_tiny_model(folder / "tied"),
        "untied": write_tiny_model(folder / "untied", tie_word_embeddings=False),
        "qwen2": write_tiny_qwen2(folder / "qwen2"),
        "neox": write_tiny_neox(folder / "neox"),
    }
    in_16_bits = write_tiny_model(folder / "bfloat16")
    AutoModelForCausalLM.from_pretrained(in_16_bits, dtype=torch.bfloat16).save_pretrained(in_16_bits)
    return {**made, "bfloat16": in_16_bits}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `rto-lightning export` and returns its only line on stderr."""
    from rto_lightning.cli import main

    def run(*args: str) -> str:
        capsys.readouterr()  # of what was made before
        assert main(["export", *args]) in (1, 2)
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        return captured.err.removeprefix("rto-lightning: error: ").strip()

    return run
