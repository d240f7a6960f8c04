import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rto_lightning.algorithms import bradley_terry_loss

SCORES = st.floats(-20, 20)


def scalar(x: float) -> torch.Tensor:
    return torch.tensor([x], dtype=torch.float64)


def test_odds_of_three_to_one() -> None:
    losses = bradley_terry_loss(
        torch.tensor([math.log(3), 0.0, 2.0], dtype=torch.float64),
        torch.tensor([0.0, math.log(3), 2.0], dtype=torch.float64),
    )
    expected = [-math.log(0.75), -math.log(0.25), math.log(2)]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64))


@given(SCORES, SCORES, st.floats(-5, 5))
def test_only_the_difference_matters(chosen: float, rejected: float, shift: float) -> None:
    losses = bradley_terry_loss(scalar(chosen), scalar(rejected))
    torch.testing.assert_close(bradley_terry_loss(scalar(chosen + shift), scalar(rejected + shift)), losses)


@given(SCORES, SCORES)
def test_both_outcomes_have_probability_one(a: float, b: float) -> None:
    total = (-bradley_terry_loss(scalar(a), scalar(b))).exp() + (-bradley_terry_loss(scalar(b), scalar(a))).exp()
    assert total.item() == pytest.approx(1)


@given(SCORES, SCORES, st.floats(0.1, 3))
def test_margin_is_a_handicap_of_the_chosen(chosen: float, rejected: float, margin: float) -> None:
    losses = bradley_terry_loss(scalar(chosen), scalar(rejected), scalar(margin))
    torch.testing.assert_close(losses, bradley_terry_loss(scalar(chosen - margin), scalar(rejected)))
    assert losses.item() > bradley_terry_loss(scalar(chosen), scalar(rejected)).item()


@given(SCORES, SCORES)
def test_gradient_is_the_probability_of_the_other_outcome(chosen: float, rejected: float) -> None:
    a, b = scalar(chosen).requires_grad_(), scalar(rejected).requires_grad_()
    bradley_terry_loss(a, b).sum().backward()
    probability = torch.sigmoid(scalar(rejected - chosen))
    torch.testing.assert_close(a.grad, -probability)
    torch.testing.assert_close(b.grad, probability)


def test_finite_far_out() -> None:
    assert bradley_terry_loss(torch.tensor([-500.0]), torch.tensor([500.0])).item() == 1000


@pytest.mark.parametrize("shapes", [[(3, 1), (3,), (3,)], [(3,), (1,), (3,)], [(3,), (3,), (1,)]])
def test_shapes_that_would_broadcast_are_refused(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="one shape"):
        bradley_terry_loss(*map(torch.zeros, shapes))
