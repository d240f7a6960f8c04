import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rto_lightning.theory import (
    Layers,
    TokenMDP,
    figure_2_judge,
    log_softmax,
    needle_judge,
    path_judge,
    path_sums,
    proposition_bound,
    random_layers,
    response_tokens,
    search_by_sentence_rewards,
    search_by_token_rewards,
    smallest_xi,
    token_query_bound,
    worst_case,
)


def random_judge(vocabulary_size: int, horizon: int, sharpness: float, seed: int) -> tuple[TokenMDP, Layers]:
    mdp = TokenMDP(vocabulary_size, horizon)
    logits = random_layers(mdp, torch.Generator().manual_seed(seed))
    return mdp, log_softmax(tuple(sharpness * layer for layer in logits))


JUDGES = st.builds(random_judge, st.integers(2, 4), st.integers(1, 5), st.floats(0, 12), st.integers(0, 10_000))


def test_example_of_figure_2_needs_at_most_4_queries() -> None:
    mdp = TokenMDP(vocabulary_size=2, horizon=3)
    needed = []
    for best in response_tokens(mdp, torch.arange(8)):
        judge = figure_2_judge(best)
        assert smallest_xi(judge) == pytest.approx(1)
        search = search_by_token_rewards(mdp, judge, xi=1)
        assert search.best == int(path_sums(judge).argmax())
        needed.append(search.queries)
    assert max(needed) == 4 == proposition_bound(mdp, xi=1)


def test_figure_2_has_the_paper_s_leaves() -> None:
    leaves = path_sums(figure_2_judge(torch.tensor([1, 0, 1]))).exp().sort(descending=True).values
    expected = torch.tensor([1 / 2, 1 / 4, 1 / 16, 1 / 16, 1 / 32, 1 / 32, 1 / 32, 1 / 32], dtype=torch.float64)
    torch.testing.assert_close(leaves, expected)


@pytest.mark.parametrize(("vocabulary_size", "horizon"), [(2, 2), (2, 5), (2, 8), (3, 4)])
def test_sentence_rewards_need_every_response_tried(vocabulary_size: int, horizon: int) -> None:
    mdp = TokenMDP(vocabulary_size, horizon)
    sentence, _ = worst_case(mdp, lambda best: needle_judge(mdp, best))
    assert sentence == mdp.responses


@given(JUDGES, st.floats(0, 1))
def test_both_learners_find_the_best_response(drawn: tuple[TokenMDP, Layers], slack: float) -> None:
    mdp, judge = drawn
    probabilities = path_sums(judge).exp()
    xi = min(smallest_xi(judge) + slack, mdp.horizon)
    for search in (search_by_sentence_rewards(judge), search_by_token_rewards(mdp, judge, xi)):
        assert probabilities[search.best].item() == pytest.approx(probabilities.max().item())


@given(JUDGES, st.floats(0, 1))
def test_token_rewards_need_no_more_queries_than_the_bound(drawn: tuple[TokenMDP, Layers], slack: float) -> None:
    mdp, judge = drawn
    xi = min(smallest_xi(judge) + slack, mdp.horizon)
    assert search_by_token_rewards(mdp, judge, xi).queries <= min(token_query_bound(mdp, xi), mdp.responses)


@given(st.integers(2, 4), st.integers(1, 8), st.integers(0, 8))
def test_closed_form_of_the_bound(vocabulary_size: int, horizon: int, xi: int) -> None:
    """The proposition's number, and what each depth of xi + 1 and more adds."""
    mdp = TokenMDP(vocabulary_size, horizon)
    deeper = (vocabulary_size - 1) * vocabulary_size**xi * max(horizon - xi - 1, 0)
    assert token_query_bound(mdp, xi) == proposition_bound(mdp, xi) + deeper


@given(st.integers(2, 3), st.integers(2, 4))
def test_the_proposition_s_number_holds_where_xi_is_nearly_the_length(vocabulary_size: int, horizon: int) -> None:
    mdp = TokenMDP(vocabulary_size, horizon)
    xi = horizon - 1
    _, judge = random_judge(vocabulary_size, horizon, sharpness=6, seed=horizon)
    if smallest_xi(judge) <= xi:
        assert search_by_token_rewards(mdp, judge, xi).queries <= proposition_bound(mdp, xi)


@pytest.mark.parametrize("horizon", [4, 6, 8])
def test_the_proposition_s_number_does_not_hold_for_long_responses(horizon: int) -> None:
    """Its proof counts the prefixes of depth xi + 1 and above; those below make the queries grow with the length."""
    mdp = TokenMDP(vocabulary_size=2, horizon=horizon)
    _, token = worst_case(mdp, lambda best: needle_judge(mdp, best))
    assert proposition_bound(mdp, xi=1) == 4 < token == horizon + 1 <= token_query_bound(mdp, xi=1)


@pytest.mark.parametrize("horizon", [4, 6, 8])
def test_an_answer_of_the_needle_judge_tells_only_how_many_first_tokens_are_right(horizon: int) -> None:
    """What the lower bound of H queries for every learner rests on."""
    mdp = TokenMDP(vocabulary_size=2, horizon=horizon)
    responses = response_tokens(mdp, torch.arange(mdp.responses))
    asked = responses[5]
    answers: dict[int, set[tuple[float, ...]]] = {}
    for best in responses:
        right = int((best == asked).long().cumprod(dim=0).sum())
        judge = needle_judge(mdp, best)
        states = torch.arange(mdp.responses)[5] >> torch.arange(horizon, 0, -1)
        answer = (judge[depth][state, asked[depth]].item() for depth, state in enumerate(states))
        answers.setdefault(right, set()).add(tuple(round(x, 12) for x in answer))
    assert {right: len(distinct) for right, distinct in answers.items()} == {right: 1 for right in range(horizon + 1)}


@pytest.mark.parametrize("free_tokens", [0, 1, 2])
def test_queries_grow_with_xi(free_tokens: int) -> None:
    mdp = TokenMDP(vocabulary_size=2, horizon=6)
    judge = needle_judge(mdp, torch.ones(6, dtype=torch.int64), free_tokens=free_tokens)
    assert smallest_xi(judge) == pytest.approx(free_tokens + 1)
    needed = search_by_token_rewards(mdp, judge, free_tokens + 1).queries
    assert 2**free_tokens * (6 - free_tokens) <= needed <= token_query_bound(mdp, free_tokens + 1)


def test_path_judge() -> None:
    judge = path_judge(TokenMDP(3, 2), torch.tensor([2, 1]), [0.6, 0.5])
    expected = torch.tensor([0.2 / 3] * 6 + [0.6 * 0.25, 0.6 * 0.5, 0.6 * 0.25], dtype=torch.float64)
    torch.testing.assert_close(path_sums(judge).exp(), expected)
    assert smallest_xi(judge) == pytest.approx(-math.log(0.3) / math.log(3))
