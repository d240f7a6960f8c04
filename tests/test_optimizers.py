"""Optimizers of torch and bitsandbytes: what they keep, and which are refused before training."""

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit
from torch import nn

from rto_lightning.errors import UserError
from rto_lightning.optimizers import build_optimizer, check_optimizer

CPU = torch.device("cpu")


def test_paged_moments_are_8_bit_moments_on_a_cpu() -> None:
    ended = []
    for make in (AdamW8bit, PagedAdamW8bit):
        generator = torch.Generator().manual_seed(0)
        weight = nn.Parameter(torch.randn(400, 300, generator=generator))
        optimizer = make([weight], lr=1e-2)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(3):
                weight.grad = torch.randn(weight.shape, generator=generator)
                optimizer.step()
        assert any("not supported on CPU" in str(warning.message) for warning in told) == (make is PagedAdamW8bit)
        ended.append(weight.detach())
    assert torch.equal(*ended)


@pytest.mark.parametrize(("elements", "dtype"), [(4095, torch.float32), (4096, torch.uint8)])
def test_small_weights_keep_32_bit_moments(elements: int, dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.zeros(elements))
    optimizer = AdamW8bit([weight])
    weight.grad = torch.ones(elements)
    optimizer.step()
    assert {optimizer.state[weight][name].dtype for name in ("state1", "state2")} == {dtype}


def test_an_optimizer_is_built_as_it_is() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = build_optimizer(partial(torch.optim.SGD, lr=0.5, momentum=0.9), [weight])
    assert type(optimizer) is torch.optim.SGD and optimizer.param_groups[0]["params"] == [weight]
    assert optimizer.defaults["momentum"] == 0.9 and not optimizer.state


class NeedsAnotherDevice(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        raise NotImplementedError("no kernel for this device\nand a second line")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            partial(AdamW8bit, amsgrad=True),
            "the optimizer does not work on cpu with float32 weights (AdamW8bit ",
        ),
        (partial(torch.optim.AdamW, lr=-1.0), "(Invalid learning rate: -1.0)"),
        (
            NeedsAnotherDevice,
            "NeedsAnotherDevice does not work on cpu with float32 weights (no kernel for this device",
        ),
        (torch.optim.SparseAdam, "SparseAdam does not support dense gradients"),
    ],
)
def test_an_optimizer_that_cannot_step_is_refused(make: Any, reason: str) -> None:
    with pytest.raises(UserError) as refusal:
        check_optimizer(make, "model.optimizer", CPU, torch.float32)
    message = str(refusal.value)
    assert message.startswith("model.optimizer: ") and reason in message
    assert message.endswith("; change its init_args, or take torch.optim.AdamW.") and "\n" not in message


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.AdamW,
        torch.optim.LBFGS,
        pytest.param(
            getattr(torch.optim, "Muon", None),
            marks=pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch is older than 2.9"),
        ),
        partial(torch.optim.AdamW, fused=True),
        AdamW8bit,
        pytest.param(PagedAdamW8bit, marks=pytest.mark.filterwarnings("ignore:Paged optimizers")),
    ],
)
def test_an_optimizer_that_can_step_is_let_through(make: Any) -> None:
    random = torch.get_rng_state()
    check_optimizer(make, "model.optimizer", CPU, torch.float32)
    assert torch.equal(torch.get_rng_state(), random)
