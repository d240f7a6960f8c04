"""An export that is wrong is told and not written."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rto_lightning.errors import UserError
from rto_lightning.export import whole as whole_file
from rto_lightning.export.check import TOLERANCE, compare, require_equal
from tests.roles import save_random_role


def nothing_is_written(models: dict[str, Path], fails: Any, *args: str, name: str = "policy") -> None:
    save_random_role(models["tied"], Path("role"), name)
    assert "more than rounding explains" in fails("role", "out", "--merge", *args)
    assert sorted(path.name for path in Path(".").iterdir()) == ["role"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_merge(models, place, fails, monkeypatch, dtype):
    merge = whole_file.merge_adapter

    def scaled(base: Any, adapter: Path, kind: torch.dtype) -> Any:
        model = merge(base, adapter, kind)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
        return model

    monkeypatch.setattr(whole_file, "merge_adapter", scaled)
    nothing_is_written(models, fails, "--dtype", dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_file(models, place, fails, monkeypatch, dtype):
    """The difference is smaller than what rounding to bfloat16 costs, and is still found."""
    save = whole_file.save_model

    def damaged(model: Any, *args: Any) -> None:
        with torch.no_grad():
            model.model.norm.weight.mul_(1.008)
        save(model, *args)

    monkeypatch.setattr(whole_file, "save_model", damaged)
    nothing_is_written(models, fails, "--dtype", dtype)


def test_a_padding_token_that_ends_answers(models, place, fails, monkeypatch):
    """The padded batch of a classifier is then read one token early."""
    monkeypatch.setattr(whole_file, "padding_token", lambda chat: "<|im_end|>")
    nothing_is_written(models, fails, "--dtype", "float32", name="reward")


def test_numbers_that_are_none_are_no_agreement():
    values = torch.tensor([1.0, 2.0])
    assert require_equal(values + TOLERANCE / 2, values, "it") == pytest.approx(TOLERANCE / 2, rel=1e-2)
    for wrong in (values + 2 * TOLERANCE, torch.tensor([1.0, torch.nan])):
        with pytest.raises(UserError, match="more than rounding explains"):
            require_equal(wrong, values, "it")


def test_agreement_counts_likeliest_tokens():
    source = torch.tensor([[1.0, 1.1], [3.0, 1.0]])
    rounded = source + torch.tensor([[0.2, 0.0], [0.0, 0.0]])
    agreement = compare(rounded, source, rounded, scores=False)
    assert agreement.largest_difference == pytest.approx(0.2) and agreement.unexplained == 0
    assert agreement.same_token == 0.5 and agreement.positions == 2
    assert str(agreement) == (
        "largest difference of logits 2.0e-01, of which rounding the weights explains all but 0.0e+00; "
        "the same likeliest token at 50.0% of 2 positions"
    )
