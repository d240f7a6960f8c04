from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rto_lightning.theory.convex import minimize

NUMBERS = st.floats(-3, 3)


def quadratic(centre: Tensor, weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: ((x - centre) @ weight @ (x - centre)) / 2


@given(st.lists(NUMBERS, min_size=3, max_size=3), st.floats(0.1, 2))
@settings(max_examples=10, deadline=None)
def test_nearest_point_of_a_ball(centre: list[float], radius: float) -> None:
    point = torch.tensor(centre, dtype=torch.float64)
    result = minimize(
        quadratic(point, torch.eye(3, dtype=torch.float64)),
        torch.zeros(3, dtype=torch.float64),
        [lambda x: x.square().sum() / radius**2 - 1],
    )
    nearest = point if point.norm() <= radius else radius * point / point.norm()
    torch.testing.assert_close(result, nearest, rtol=0, atol=1e-6)


def test_without_constraints() -> None:
    weight = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    centre = torch.tensor([1.0, -2.0], dtype=torch.float64)
    result = minimize(quadratic(centre, weight), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(result, centre, rtol=0, atol=1e-8)


def test_two_active_constraints_meet_at_the_corner() -> None:
    """The lowest point of x + y within two circles is where they cross."""
    result = minimize(
        lambda x: x.sum(),
        torch.tensor([0.1, 0.1], dtype=torch.float64),
        [
            lambda x: (x - torch.tensor([1, 0])).square().sum() - 1,
            lambda x: (x - torch.tensor([0, 1])).square().sum() - 1,
        ],
    )
    torch.testing.assert_close(result, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-6)


def test_constraints_that_exclude_each_other_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="no minimum within"):
        minimize(
            lambda x: x.square().sum(),
            torch.zeros(1, dtype=torch.float64),
            [lambda x: (x - 3).square().sum() - 1, lambda x: (x + 3).square().sum() - 1],
        )
