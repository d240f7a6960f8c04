import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rto_lightning.algorithms import generalized_advantages
from rto_lightning.theory import (
    Layers,
    OptimizerSettings,
    TokenMDP,
    compare_rewards,
    evaluate_policy,
    expected_gae,
    implicit_rewards,
    iterations_to,
    optimize_policy,
    path_sums,
    ppo_rewards,
    shaped_rewards,
    soft_value_iteration,
    suboptimality,
)
from tests.theory.problems import PROBLEMS, Problem, largest_difference, problem

LAMS = st.sampled_from([0.0, 0.5, 0.95, 1.0])


@given(PROBLEMS, LAMS)
def test_expected_gae_is_the_average_of_that_of_sampled_responses(drawn: Problem, lam: float) -> None:
    critic = tuple(layer[:, 0] for layer in drawn.rewards)
    expected = expected_gae(drawn.log_policy, drawn.rewards, drawn.log_reference, critic, drawn.beta, lam)
    width = drawn.mdp.horizon
    states = torch.arange(drawn.mdp.responses)[:, None] // drawn.mdp.vocabulary_size ** torch.arange(width, 0, -1)
    along = range(width)

    def gather(layers: Layers) -> Tensor:
        return torch.stack([layers[t][states[:, t], drawn.tokens[:, t]] for t in along], dim=1)

    paid = gather(drawn.rewards) - drawn.beta * (gather(drawn.log_policy) - gather(drawn.log_reference))
    values = torch.stack([critic[t][states[:, t]] for t in along], dim=1)
    mask = torch.ones_like(paid, dtype=torch.bool)
    advantages, _ = generalized_advantages(paid, values, mask, gamma=1.0, lam=lam)
    probabilities = path_sums(drawn.log_policy).exp()
    for depth, layer in enumerate(expected):
        rows = (layer.numel(), -1)
        weights, sampled = probabilities.view(rows), advantages[:, depth].view(rows)
        average = (weights * sampled).sum(dim=1) / weights.sum(dim=1)
        torch.testing.assert_close(average, layer.flatten(), rtol=0, atol=1e-9)


@given(PROBLEMS, LAMS)
def test_a_critic_that_is_right_gives_the_advantages_for_every_lambda(drawn: Problem, lam: float) -> None:
    exact = evaluate_policy(drawn.log_policy, drawn.rewards, drawn.log_reference, drawn.beta)
    estimate = expected_gae(drawn.log_policy, drawn.rewards, drawn.log_reference, exact.values, drawn.beta, lam)
    advantages = tuple(
        q_layer - value[:, None] - drawn.beta * policy
        for q_layer, value, policy in zip(exact.q_values, exact.values, drawn.log_policy, strict=True)
    )
    assert largest_difference(estimate, advantages) < 1e-9


@given(PROBLEMS, LAMS)
def test_with_the_rewards_of_dpo_the_optimal_policy_needs_no_critic(drawn: Problem, lam: float) -> None:
    """Every advantage is 0 with a critic of 0: the optimal policy is where RTO ends, whatever lambda."""
    optimal = soft_value_iteration(drawn.rewards, drawn.log_reference, drawn.beta).log_policy
    implicit = implicit_rewards(optimal, drawn.log_reference, drawn.beta)
    critic = tuple(torch.zeros_like(layer[:, 0]) for layer in implicit)
    estimate = expected_gae(optimal, implicit, drawn.log_reference, critic, drawn.beta, lam)
    assert max(layer.abs().max().item() for layer in estimate) < 1e-9


@given(PROBLEMS)
def test_shaped_rewards_sum_to_the_rewards(drawn: Problem) -> None:
    shaped = shaped_rewards(drawn.mdp, drawn.rewards, drawn.log_policy, drawn.log_reference, drawn.beta)
    torch.testing.assert_close(path_sums(shaped), path_sums(drawn.rewards), rtol=0, atol=1e-9)


def test_without_a_critic_to_trust_ppo_and_rto_make_the_same_steps() -> None:
    """Lambda 1: the advantages depend on the returns alone, which differ by one number."""
    drawn = problem(3, 4, beta=0.1, seed=0)
    optimal = soft_value_iteration(drawn.rewards, drawn.log_reference, drawn.beta).log_policy
    settings = OptimizerSettings(beta=drawn.beta, lam=1.0, iterations=60)
    ppo, rto = (
        optimize_policy(rewards, drawn.rewards, drawn.log_reference, settings)
        for rewards in (ppo_rewards(drawn.mdp, drawn.rewards), implicit_rewards(optimal, drawn.log_reference, 0.1))
    )
    torch.testing.assert_close(ppo, rto, rtol=0, atol=1e-9)
    assert ppo[0].item() == suboptimality(drawn.log_reference, drawn.rewards, drawn.log_reference, drawn.beta)
    assert ppo[0].item() > 1 > 1e-6 > ppo[-1].item()


def test_the_less_lambda_the_more_iterations_ppo_needs_and_rto_does_not() -> None:
    lams = [0.0, 0.5, 0.95, 1.0]
    settings = OptimizerSettings(iterations=120)
    result = compare_rewards(TokenMDP(3, 3), lams, seeds=3, settings=settings, epsilon=0.01, dpo_error=0.25)
    ppo, rto = result.ppo.median(dim=1).values, result.rto.median(dim=1).values
    assert bool((ppo.diff() <= 0).all())
    assert ppo[0].item() >= 2 * ppo[-1].item()
    assert rto.max().item() <= rto.min().item() + 2
    assert bool((result.rto[:-1] <= result.ppo[:-1]).all())
    assert result.rto[-1].tolist() == result.ppo[-1].tolist() == result.shaped[-1].tolist()


def test_without_any_critic_ppo_does_not_arrive() -> None:
    drawn = problem(3, 4, beta=0.1, seed=0)
    settings = OptimizerSettings(beta=0.1, lam=0.5, critic_rate=0.0, iterations=300)
    gaps = optimize_policy(ppo_rewards(drawn.mdp, drawn.rewards), drawn.rewards, drawn.log_reference, settings)
    assert iterations_to(gaps, epsilon=0.1) is None


@pytest.mark.parametrize(
    ("gaps", "expected"), [([3.0, 2.0, 0.5], 2), ([3.0, 0.5, 2.0, 0.5], 3), ([0.5, 0.1], 0), ([3.0, 0.5, 2.0], None)]
)
def test_iterations_to(gaps: list[float], expected: int | None) -> None:
    assert iterations_to(torch.tensor(gaps), epsilon=1.0) == expected
