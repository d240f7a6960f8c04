"""Optimizers by their short names, on the command line and in files."""

import inspect
import sys
from typing import Any

import bitsandbytes.optim
import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch.optim import Optimizer

from rto_lightning.cli.lightning_cli import stage_module_class
from rto_lightning.cli.short_names import explain_name, know_optimizers

OF_TORCH = [name for name, value in vars(torch.optim).items() if inspect.isclass(value) and value is not Optimizer]


def parsed(value: Any, kind: Any = OptimizerCallable) -> Any:
    """What the parser makes of a value: a text as on the command line, a mapping as in a file."""
    stage_module_class()
    know_optimizers()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--made", type=kind)
    result = parser.parse_args([f"--made={value}"]) if isinstance(value, str) else parser.parse_object({"made": value})
    return result.made


@pytest.mark.parametrize("name", OF_TORCH)
def test_names_of_torch_are_torchs(name: str) -> None:
    assert parsed(name).class_path == f"torch.optim.{name}"


def test_bitsandbytes_repeats_names_of_torch() -> None:
    repeated = {name for name in OF_TORCH if hasattr(bitsandbytes.optim, name)}
    assert {"Adam", "AdamW", "SGD"} <= repeated


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "PagedAdamW32bit", "Lion8bit", "Lion"])
def test_other_names_are_those_of_bitsandbytes(name: str) -> None:
    assert parsed(name).class_path == f"bitsandbytes.optim.{name}"


def test_a_mapping_takes_a_short_name_and_keeps_what_is_set() -> None:
    made = parsed({"class_path": "PagedAdamW8bit", "init_args": {"lr": 2e-4, "betas": [0.9, 0.95]}})
    assert made.class_path == "bitsandbytes.optim.PagedAdamW8bit"
    assert (made.init_args.lr, made.init_args.betas) == (2e-4, (0.9, 0.95))
    made = parsed({"class_path": "AdamW", "init_args": {"fused": True}})
    assert made.class_path == "torch.optim.AdamW" and made.init_args.fused is True


def test_other_types_are_named_as_before() -> None:
    made = parsed({"class_path": "StepLR", "init_args": {"step_size": 3}}, LRSchedulerCallable)
    assert made.class_path == "torch.optim.lr_scheduler.StepLR"
    made = parsed({"class_path": "CosineWithWarmup", "init_args": {"total_steps": 3}}, LRSchedulerCallable)
    assert made.class_path.startswith("rto_lightning.modules.") and made.class_path.endswith(".CosineWithWarmup")


def hide_bitsandbytes(monkeypatch) -> None:
    """As if it was not installed: its classes are known to nobody."""
    monkeypatch.setattr(Optimizer, "__subclasses__", lambda: [torch.optim.AdamW], raising=False)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit"])
def test_bitsandbytes_is_not_installed(name: str, monkeypatch) -> None:
    hide_bitsandbytes(monkeypatch)
    for value in (name, {"class_path": name}):
        with pytest.raises(ArgumentError) as error:
            parsed(value)
        assert f"{name} is an optimizer of bitsandbytes, which cannot be imported (" in str(error.value)
        assert "pip install bitsandbytes" in str(error.value)
    assert parsed("AdamW").class_path == "torch.optim.AdamW"


def test_an_unknown_name_says_nothing_of_bitsandbytes(monkeypatch) -> None:
    hide_bitsandbytes(monkeypatch)
    with pytest.raises(ArgumentError) as error:
        parsed("Nope")
    assert "bitsandbytes" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "name", "hint"),
    [
        ("model.policy_optimizer", "adamw", "did you mean AdamW?"),
        ("model.optimizer", "pagedadamw8bit", "did you mean PagedAdamW8bit?"),
        ("model.optimizer", "CosineLR", "give its import path (`module.Class`)."),
        ("model.critic_scheduler", "CosineLR", "did you mean CosineAnnealingLR?"),
        ("model.lr_scheduler", "cosinewithwarmup", "did you mean CosineWithWarmup?"),
        ("model", "RTOmodul", "did you mean RTOModule?"),
        (
            "data",
            "Prompts",
            "choose one of DemonstrationDataModule, PreferenceDataModule, PromptDataModule, or give its import path "
            "(`module.Class`).",
        ),
    ],
)
def test_the_most_similar_name_is_proposed(key: str, name: str, hint: str) -> None:
    assert explain_name(key, name) == f"no class is known as {name}; {hint}"
