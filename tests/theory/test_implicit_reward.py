import pytest
import torch
from hypothesis import given

from rto_lightning.theory import (
    expected_dpo_loss,
    implicit_rewards,
    path_sums,
    soft_advantages,
    soft_value_iteration,
    train_dpo,
)
from tests.theory.problems import PROBLEMS, Problem, largest_difference, problem


@given(PROBLEMS)
def test_log_ratio_of_the_optimal_policy_is_the_soft_advantage(drawn: Problem) -> None:
    solution = soft_value_iteration(drawn.rewards, drawn.log_reference, drawn.beta)
    implicit = implicit_rewards(solution.log_policy, drawn.log_reference, drawn.beta)
    assert largest_difference(implicit, soft_advantages(drawn.rewards, solution.values)) < 1e-9


@given(PROBLEMS)
def test_the_optimal_policy_minimizes_the_dpo_loss(drawn: Problem) -> None:
    """Its loss is the entropy of the labels, which no prediction of them goes below, and its gradient is 0."""
    solution = soft_value_iteration(drawn.rewards, drawn.log_reference, drawn.beta)
    policy = tuple(layer.requires_grad_() for layer in solution.log_policy)
    sums = path_sums(drawn.rewards)
    loss = expected_dpo_loss(policy, drawn.log_reference, sums, drawn.beta)
    loss.backward()
    probabilities = torch.sigmoid(sums[:, None] - sums)
    assert loss.item() == pytest.approx(-(probabilities * probabilities.log()).mean().item(), abs=1e-9)
    assert all(layer.grad.abs().max().item() < 1e-9 for layer in policy if layer.grad is not None)
    other = expected_dpo_loss(drawn.log_policy, drawn.log_reference, sums, drawn.beta)
    assert other.item() >= loss.item() - 1e-12


@pytest.mark.parametrize(("vocabulary_size", "horizon"), [(2, 4), (3, 3)])
def test_training_from_preferences_alone_finds_the_soft_advantage(vocabulary_size: int, horizon: int) -> None:
    drawn = problem(vocabulary_size, horizon, beta=0.5, seed=2)
    trained = train_dpo(drawn.mdp, drawn.log_reference, path_sums(drawn.rewards), drawn.beta)
    solution = soft_value_iteration(drawn.rewards, drawn.log_reference, drawn.beta)
    implicit = implicit_rewards(trained, drawn.log_reference, drawn.beta)
    # In float64 the loss is level within 1e-7 or so of its minimum.
    assert largest_difference(implicit, soft_advantages(drawn.rewards, solution.values)) < 1e-6
    assert largest_difference(implicit, drawn.rewards) > 0.1


@given(PROBLEMS)
def test_the_implicit_reward_differs_by_a_potential(drawn: Problem) -> None:
    """Sums over responses differ by one number, so preferences and the optimal policy are those of the true reward."""
    solution = soft_value_iteration(drawn.rewards, drawn.log_reference, drawn.beta)
    implicit = implicit_rewards(solution.log_policy, drawn.log_reference, drawn.beta)
    differences = path_sums(drawn.rewards) - path_sums(implicit)
    torch.testing.assert_close(differences, solution.start.expand_as(differences), rtol=0, atol=1e-9)
    again = soft_value_iteration(implicit, drawn.log_reference, drawn.beta)
    assert largest_difference(again.log_policy, solution.log_policy) < 1e-9
    assert largest_difference(again.values, tuple(torch.zeros_like(layer) for layer in again.values)) < 1e-9


@given(PROBLEMS)
def test_any_potential_leaves_the_optimal_policy(drawn: Problem) -> None:
    potential = tuple(3 * layer[:, 0] for layer in drawn.log_policy)
    shaped = soft_advantages(drawn.rewards, potential)
    first = soft_value_iteration(drawn.rewards, drawn.log_reference, drawn.beta)
    second = soft_value_iteration(shaped, drawn.log_reference, drawn.beta)
    assert largest_difference(first.log_policy, second.log_policy) < 1e-9
