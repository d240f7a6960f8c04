import itertools

import pytest
import torch
from hypothesis import given

from rto_lightning.errors import UserError
from rto_lightning.theory import (
    TokenMDP,
    at_last_token,
    path_sums,
    response_tokens,
    sample_responses,
    token_policy,
    uniform_log_policy,
)
from tests.theory.problems import PROBLEMS, Problem, problem


def test_states_are_the_prefixes() -> None:
    mdp = TokenMDP(vocabulary_size=3, horizon=4)
    prefixes = [prefix for length in range(5) for prefix in itertools.product(range(3), repeat=length)]
    assert mdp.states == len(prefixes)
    assert mdp.responses == 81
    assert mdp.layer_shapes == [(1, 3), (3, 3), (9, 3), (27, 3)]


def test_size_of_the_largest_example_is_allowed() -> None:
    assert TokenMDP(vocabulary_size=8, horizon=8).states == 19_173_961


@pytest.mark.parametrize(("vocabulary_size", "horizon", "states"), [(8, 9, "153,391,689"), (2, 100, "2,535,301,")])
def test_larger_sizes_are_refused_with_the_number_of_states(vocabulary_size: int, horizon: int, states: str) -> None:
    with pytest.raises(UserError, match=states):
        TokenMDP(vocabulary_size, horizon)


@pytest.mark.parametrize(("vocabulary_size", "horizon"), [(1, 3), (3, 0)])
def test_no_choice_and_no_step_are_refused(vocabulary_size: int, horizon: int) -> None:
    with pytest.raises(UserError, match="2 tokens and 1 step"):
        TokenMDP(vocabulary_size, horizon)


@given(PROBLEMS)
def test_path_sums_follow_the_transitions(drawn: Problem) -> None:
    sums = path_sums(drawn.rewards)
    for response, tokens in enumerate(drawn.tokens.tolist()):
        state, total = 0, 0.0
        for layer, token in zip(drawn.rewards, tokens, strict=True):
            total += layer[state, token].item()
            state = state * drawn.mdp.vocabulary_size + token
        assert state == response
        assert sums[response].item() == pytest.approx(total, abs=1e-12)


@given(PROBLEMS)
def test_sentence_rewards_stand_at_the_last_token(drawn: Problem) -> None:
    sentence_rewards = path_sums(drawn.rewards)
    sparse = at_last_token(drawn.mdp, sentence_rewards)
    torch.testing.assert_close(path_sums(sparse), sentence_rewards, rtol=0, atol=0)
    assert all(layer.count_nonzero() == 0 for layer in sparse[:-1])


@given(PROBLEMS)
def test_policies_are_distributions_over_responses(drawn: Problem) -> None:
    for log_policy in (drawn.log_policy, uniform_log_policy(drawn.mdp)):
        assert path_sums(log_policy).exp().sum().item() == pytest.approx(1)


def test_samples_follow_the_policy() -> None:
    drawn = problem(3, 3, 1.0, seed=1)
    samples = sample_responses(drawn.log_policy, 200_000, torch.Generator().manual_seed(0))
    frequencies = torch.bincount(samples, minlength=27) / 200_000
    # Five standard deviations of the most frequent response.
    torch.testing.assert_close(frequencies.double(), path_sums(drawn.log_policy).exp(), rtol=0, atol=5e-3)


def test_a_token_of_probability_0_is_never_drawn() -> None:
    mdp = TokenMDP(3, 4)
    policy = token_policy(mdp, torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64))
    samples = sample_responses(policy, 1000, torch.Generator().manual_seed(0))
    assert set(response_tokens(mdp, samples).flatten().tolist()) == {0, 1}
