import math

import pytest
import torch
from hypothesis import given

from rto_lightning.theory import (
    TokenMDP,
    evaluate_policy,
    expectation,
    expected_kl,
    path_sums,
    random_features,
    soft_value_iteration,
    suboptimality,
    uniform_log_policy,
    visitation,
)
from tests.theory.problems import PROBLEMS, Problem, problem


@given(PROBLEMS)
def test_the_optimal_policy_is_the_gibbs_distribution_over_responses(drawn: Problem) -> None:
    solution = soft_value_iteration(drawn.rewards, drawn.log_reference, drawn.beta)
    torch.testing.assert_close(path_sums(solution.log_policy), drawn.optimal_response_logprobs, rtol=0, atol=1e-10)
    scores = path_sums(drawn.log_reference) + path_sums(drawn.rewards) / drawn.beta
    assert solution.start.item() == pytest.approx(drawn.beta * scores.logsumexp(dim=0).item(), abs=1e-10)


@given(PROBLEMS)
def test_equation_3_4(drawn: Problem) -> None:
    solution = soft_value_iteration(drawn.rewards, drawn.log_reference, drawn.beta)
    for q_layer, value, policy in zip(solution.q_values, solution.values, solution.log_policy, strict=True):
        torch.testing.assert_close(policy, (q_layer - value[:, None]) / drawn.beta, rtol=0, atol=1e-10)
        torch.testing.assert_close(policy.exp().sum(dim=1), torch.ones_like(value))


@given(PROBLEMS)
def test_value_of_a_policy_is_its_expected_reward_minus_its_divergence(drawn: Problem) -> None:
    values = evaluate_policy(drawn.log_policy, drawn.rewards, drawn.log_reference, drawn.beta)
    policy, reference = path_sums(drawn.log_policy), path_sums(drawn.log_reference)
    expected = policy.exp() @ (path_sums(drawn.rewards) - drawn.beta * (policy - reference))
    assert values.start.item() == pytest.approx(expected.item(), abs=1e-10)


@given(PROBLEMS)
def test_the_optimal_policy_has_the_optimal_values_and_no_policy_has_higher_ones(drawn: Problem) -> None:
    solution = soft_value_iteration(drawn.rewards, drawn.log_reference, drawn.beta)
    same = evaluate_policy(solution.log_policy, drawn.rewards, drawn.log_reference, drawn.beta)
    other = evaluate_policy(drawn.log_policy, drawn.rewards, drawn.log_reference, drawn.beta)
    for best, again, lower in zip(solution.values, same.values, other.values, strict=True):
        torch.testing.assert_close(best, again, rtol=0, atol=1e-10)
        assert bool((lower <= best + 1e-10).all())


@given(PROBLEMS)
def test_performance_difference_lemma(drawn: Problem) -> None:
    """The paper's lemma A.2, with the optimal policy as the other one: what is lost is beta times the divergence."""
    solution = soft_value_iteration(drawn.rewards, drawn.log_reference, drawn.beta)
    gap = suboptimality(drawn.log_policy, drawn.rewards, drawn.log_reference, drawn.beta)
    divergence = expected_kl(drawn.log_policy, solution.log_policy).item()
    assert gap == pytest.approx(drawn.beta * divergence, abs=1e-9)


@given(PROBLEMS)
def test_visitation(drawn: Problem) -> None:
    visits = visitation(drawn.log_policy)
    assert all(layer.sum().item() == pytest.approx(1) for layer in visits)
    expected = path_sums(drawn.log_policy).exp() @ path_sums(drawn.rewards)
    assert expectation(visits, drawn.rewards).item() == pytest.approx(expected.item(), abs=1e-12)


def test_expectation_of_features() -> None:
    drawn = problem(3, 3, 1.0, seed=0)
    features = random_features(drawn.mdp, 4, torch.Generator().manual_seed(0))
    expected = path_sums(drawn.log_policy).exp() @ path_sums(features)
    torch.testing.assert_close(expectation(visitation(drawn.log_policy), features), expected)


def test_the_largest_example_is_solved_exactly() -> None:
    """Eight tokens and eight steps. Rewards that depend on the token alone have a closed form."""
    mdp = TokenMDP(vocabulary_size=8, horizon=8)
    token_rewards = torch.linspace(-1, 1, 8, dtype=torch.float64)
    rewards = tuple(token_rewards.expand(shape) for shape in mdp.layer_shapes)
    solution = soft_value_iteration(rewards, uniform_log_policy(mdp), beta=0.5)
    step = 0.5 * math.log((token_rewards / 0.5).exp().mean().item())
    assert solution.start.item() == pytest.approx(8 * step, abs=1e-10)
    policy = (token_rewards / 0.5).softmax(dim=0)
    torch.testing.assert_close(solution.log_policy[-1][-1].exp(), policy, rtol=0, atol=1e-12)
