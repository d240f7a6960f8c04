"""Minimization of smooth convex functions within smooth convex constraints: L-BFGS in a method of multipliers."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]

ROUNDS = 60
FIRST_PENALTY = 1.0
LARGEST_PENALTY = 1e3


def minimize(
    objective: Function, start: Tensor, constraints: Sequence[Function] = (), tolerance: float = 1e-8
) -> Tensor:
    r"""Minimize a convex function :math:`f(x)` where convex functions :math:`g_i(x)` are not positive.

    The method of multipliers for inequalities (R. T. Rockafellar, "The multiplier method of Hestenes and Powell applied
    to convex programming", 1973). Every round minimizes, by L-BFGS,

    .. math::
        f(x) + \frac{1}{2 c} \sum_i \max(0, \mu_i + c\, g_i(x))^2

    and then sets :math:`\mu_i \leftarrow \max(0, \mu_i + c\, g_i(x))`.

    Args:
        objective: :math:`f`, from a vector to a scalar, differentiable by torch.
        start: Where to begin, float64, shape ``(d,)``. It need not satisfy the constraints. Along directions in which
            the objective is flat, the result stays where it began.
        constraints: The :math:`g_i`, scaled so that -1 to 1 is their natural range.
        tolerance: Largest violation, and largest slack of a constraint whose multiplier is not 0.

    Returns:
        The minimizer, shape ``(d,)``.

    Raises:
        RuntimeError: If the rounds do not suffice.
    """
    x, penalty = start, FIRST_PENALTY
    multipliers = start.new_zeros(len(constraints))

    def updated_multipliers(x: Tensor) -> Tensor:
        values = [constraint(x) for constraint in constraints]
        return (multipliers + penalty * torch.stack(values) if values else multipliers).clamp(min=0)

    def augmented(x: Tensor) -> Tensor:
        return objective(x) + updated_multipliers(x).square().sum() / (2 * penalty)

    for _ in range(ROUNDS):
        x = lbfgs(augmented, x)
        change = updated_multipliers(x) - multipliers
        multipliers = multipliers + change
        if bool((change.abs() <= tolerance * penalty).all()):
            return x
        penalty = min(2 * penalty, LARGEST_PENALTY)
    raise RuntimeError(f"no minimum within {ROUNDS} rounds; the constraints are off by {(change / penalty).tolist()}")


def lbfgs(objective: Function, start: Tensor) -> Tensor:
    """Minimize a smooth function without constraints, about as well as float64 resolves its value.

    A value that is known to 16 digits tells the place of the minimum to 8.

    Args:
        objective: From a vector to a scalar, differentiable by torch.
        start: Where to begin, float64, shape ``(d,)``.

    Returns:
        The minimizer, shape ``(d,)``.
    """
    x = start.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x], max_iter=1000, tolerance_grad=1e-13, tolerance_change=1e-16, history_size=50, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(x)
        loss.backward()
        return loss

    optimizer.step(closure)
    return x.detach()
