"""The learning-rate schedule, by hand."""

import itertools
import math

import pytest
import torch

from rto_lightning.modules import CosineWithWarmup

PEAK = 2.0


def make(**settings) -> tuple[torch.optim.Optimizer, CosineWithWarmup]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    return optimizer, CosineWithWarmup(optimizer, **settings)


def rates(steps: int, **settings) -> list[float]:
    """The learning rate of each of the first `steps` steps."""
    optimizer, schedule = make(**settings)
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


def test_values_by_hand() -> None:
    # 4 steps of warm-up, then half a cosine wave over 16 steps, from 2 to a floor of 0.2.
    found = rates(30, total_steps=20, warmup=0.2, floor=0.1)
    assert found[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert found[4] == pytest.approx(2.0)  # the top of the cosine
    assert found[8] == pytest.approx(0.2 + 1.8 * (1 + math.sqrt(0.5)) / 2)  # a quarter of it
    assert found[12] == pytest.approx(1.1)  # half-way between 2 and 0.2
    assert found[16] == pytest.approx(0.2 + 1.8 * (1 - math.sqrt(0.5)) / 2)
    assert found[20:] == pytest.approx([0.2] * 10)  # the floor, and no way up again
    assert all(later < earlier for earlier, later in itertools.pairwise(found[4:21]))


def test_warmup_is_rounded_and_never_empty() -> None:
    assert rates(2, total_steps=10, warmup=0.0, floor=0.0) == pytest.approx([PEAK, PEAK])
    assert rates(3, total_steps=33, warmup=0.05) == pytest.approx([1.0, 2.0, 2.0])  # 1.65 steps, rounded to 2


def test_defaults() -> None:
    found = rates(101, total_steps=100)
    assert found[:4] == pytest.approx([PEAK / 3, 2 * PEAK / 3, PEAK, PEAK])
    assert found[100] == pytest.approx(0.1 * PEAK)


def test_a_floor_of_one_is_constant_after_the_warmup() -> None:
    assert rates(12, total_steps=10, warmup=0.1, floor=1.0) == pytest.approx([PEAK] * 12)


def test_it_goes_on_from_its_state() -> None:
    settings = {"total_steps": 20, "warmup": 0.2}
    optimizer, schedule = make(**settings)
    for _ in range(7):
        optimizer.step()
        schedule.step()
    again, resumed = make(**settings)
    resumed.load_state_dict(schedule.state_dict())
    again.load_state_dict(optimizer.state_dict())
    again.step()
    resumed.step()
    assert resumed.get_last_lr() == pytest.approx(rates(9, **settings)[8:])
    assert again.param_groups[0]["lr"] == pytest.approx(rates(9, **settings)[8])
