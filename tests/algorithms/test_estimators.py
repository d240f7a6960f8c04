import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from rto_lightning.algorithms import (
    GROUP_ESTIMATORS,
    Estimator,
    RewardTerms,
    estimate_advantages,
    generalized_advantages,
    place_at_last_token,
    return_to_go,
)

from .strategies import GARBAGE, Batch

UNIT = st.floats(0, 1)
GROUPED = st.sampled_from(sorted(GROUP_ESTIMATORS))
ESTIMATORS = st.sampled_from(["gae", "reinforce++", "rloo", "grpo"])


@st.composite
def groups(draw: st.DrawFn, min_length: int = 0) -> tuple[Batch, int]:
    """1 to 3 groups of 2 to 4 responses each, and the group size."""
    size, width = draw(st.integers(2, 4)), draw(st.integers(1, 6))
    rows = size * draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(min_length, width), min_size=rows, max_size=rows))
    return Batch(lengths, width, draw(st.sampled_from(GARBAGE)), draw(st.integers(0, 2**32 - 1))), size


def reward_terms(batch: Batch, dense: bool = True) -> RewardTerms:
    nothing = torch.zeros_like(batch.normal())
    return RewardTerms(
        token=batch.normal() * batch.mask if dense else nothing,
        kl=batch.normal() * batch.mask if dense else nothing,
        score=place_at_last_token(batch.scores(), batch.mask),
    )


def shifted(terms: RewardTerms, shift: Tensor, mask: Tensor) -> RewardTerms:
    return RewardTerms(token=terms.token, kl=terms.kl, score=terms.score + place_at_last_token(shift, mask))


def tensor(numbers: list[list[float]]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_two_responses_by_hand() -> None:
    mask = torch.tensor([[True, True, True], [True, True, False]])
    terms = RewardTerms(
        token=tensor([[1, 2, 4], [8, 16, 0]]),
        kl=tensor([[0, 0, 0.5], [0, -1, 0]]),
        score=tensor([[0, 0, 3], [0, 5, 0]]),
    )
    advantages, returns = estimate_advantages("rloo", terms, mask, gamma=1.0, lam=1.0, group_size=2)
    # Dense returns-to-go are 7.5, 6.5, 4.5 and 23, 15; nothing else runs at the third token. Scores differ by 2.
    assert advantages.tolist() == [[-2 - 15.5, -2 - 8.5, -2 + 4.5], [2 + 15.5, 2 + 8.5, 0]]
    assert returns.tolist() == [[10.5, 9.5, 7.5], [28, 20, 0]]
    normalized, _ = estimate_advantages("grpo", terms, mask, gamma=1.0, lam=1.0, group_size=2)
    # Means of the whole group halve the difference of scores; totals are 10.5 and 28.
    expected = tensor([[-1 - 15.5, -1 - 8.5, -1 + 4.5], [1 + 15.5, 1 + 8.5, 0]]) / (17.5 / 2**0.5 + 1e-4)
    torch.testing.assert_close(normalized, expected)


@given(groups(), GROUPED, UNIT)
def test_equations_of_group_estimators(drawn: tuple[Batch, int], estimator: Estimator, gamma: float) -> None:
    batch, size = drawn
    terms = reward_terms(batch)
    dense = return_to_go(terms.token + terms.kl, batch.mask, gamma)
    scores, totals = terms.score.sum(dim=1), terms.total.sum(dim=1)
    expected, relative = torch.zeros_like(dense), torch.zeros_like(dense)
    for row, length in enumerate(batch.lengths):
        group = range(row - row % size, row - row % size + size)
        others = [other for other in group if other != row]
        for t in range(length):
            running = [dense[other, t] for other in others if t < batch.lengths[other]]
            relative[row, t] = dense[row, t] - (sum(running) / len(running) if running else 0)
            baseline = scores[others].mean() if estimator == "rloo" else scores[group].mean()
            expected[row, t] = relative[row, t] + scores[row] - baseline
    if estimator == "grpo":
        for start in range(0, len(batch.lengths), size):
            rows = slice(start, start + size)
            size_of_dense = relative[rows][batch.mask[rows]].square().mean().sqrt() if batch.mask[rows].any() else 0
            expected[rows] /= max(float(totals[rows].std()), float(size_of_dense)) + 1e-4
    advantages, returns = estimate_advantages(estimator, terms, batch.mask, gamma, 1.0, group_size=size)
    torch.testing.assert_close(advantages, expected)
    assert torch.equal(returns, return_to_go(terms.total, batch.mask, gamma))


@given(groups(min_length=1), UNIT)
def test_without_dense_terms_they_are_those_of_the_papers(drawn: tuple[Batch, int], gamma: float) -> None:
    batch, size = drawn
    terms = reward_terms(batch, dense=False)
    scores = terms.score.sum(dim=1).view(-1, size)
    rloo = scores - (scores.sum(dim=1, keepdim=True) - scores) / (size - 1)
    grpo = (scores - scores.mean(dim=1, keepdim=True)) / (scores.std(dim=1, keepdim=True) + 1e-4)
    for estimator, expected in (("rloo", rloo), ("grpo", grpo)):
        advantages, _ = estimate_advantages(estimator, terms, batch.mask, gamma, 1.0, group_size=size)
        torch.testing.assert_close(advantages, expected.reshape(-1, 1) * batch.mask)


@given(groups(min_length=1), GROUPED)
def test_better_scores_for_a_whole_group_change_nothing(drawn: tuple[Batch, int], estimator: Estimator) -> None:
    batch, size = drawn
    terms = reward_terms(batch)
    shift = batch.scores()[::size].repeat_interleave(size)
    plain, _ = estimate_advantages(estimator, terms, batch.mask, 0.9, 1.0, group_size=size)
    moved, _ = estimate_advantages(estimator, shifted(terms, shift, batch.mask), batch.mask, 0.9, 1.0, group_size=size)
    torch.testing.assert_close(moved, plain)


@given(groups(min_length=1), GROUPED)
def test_groups_do_not_see_each_other(drawn: tuple[Batch, int], estimator: Estimator) -> None:
    batch, size = drawn
    terms = reward_terms(batch)
    together, _ = estimate_advantages(estimator, terms, batch.mask, 0.9, 1.0, group_size=size)
    for start in range(0, len(batch.mask), size):
        rows = slice(start, start + size)
        own = RewardTerms(token=terms.token[rows], kl=terms.kl[rows], score=terms.score[rows])
        alone, _ = estimate_advantages(estimator, own, batch.mask[rows], 0.9, 1.0, group_size=size)
        torch.testing.assert_close(alone, together[rows])


@given(groups(min_length=1), st.floats(0.1, 10))
def test_grpo_forgets_the_unit_of_all_rewards_together(drawn: tuple[Batch, int], scale: float) -> None:
    batch, size = drawn
    terms = reward_terms(batch)
    larger = RewardTerms(token=scale * terms.token, kl=scale * terms.kl, score=scale * terms.score)
    plain, _ = estimate_advantages("grpo", terms, batch.mask, 1.0, 1.0, group_size=size)
    scaled, _ = estimate_advantages("grpo", larger, batch.mask, 1.0, 1.0, group_size=size)
    # The 1e-4 alone has a unit: one factor a group, near 1 where rewards are not near 0.
    for rows in torch.arange(len(batch.lengths)).split(size):
        largest = plain[rows].abs().amax()
        factor = scaled[rows].abs().amax() / largest if largest > 0 else torch.ones_like(largest)
        torch.testing.assert_close(scaled[rows], plain[rows] * factor)
        deviation = terms.total[rows].sum(dim=1).std()
        if deviation > 0.1:
            assert factor == pytest.approx(1, abs=2e-3 * max(1, 1 / scale))


def test_grpo_bounds_the_dense_term_where_totals_are_equal() -> None:
    """Shaped token rewards sum to 0 and the scores tie: the deviation of totals is 0, the advantages are not huge."""
    mask = torch.ones(2, 3, dtype=torch.bool)
    token = tensor([[1, -2, 1], [-1, 2, -1]])
    terms = RewardTerms(token=token, kl=torch.zeros_like(token), score=tensor([[0, 0, 1], [0, 0, 1]]))
    advantages, _ = estimate_advantages("grpo", terms, mask, gamma=1.0, lam=1.0, group_size=2)
    # Returns-to-go are 0, -1, 1 and 0, 1, -1; their differences 0, -2, 2 have a root mean square of sqrt(8 / 3).
    expected = tensor([[0, -2, 2], [0, 2, -2]]) / ((8 / 3) ** 0.5 + 1e-4)
    torch.testing.assert_close(advantages, expected)


@pytest.mark.parametrize("estimator", ["rloo", "reinforce++"])
@pytest.mark.parametrize("size", [2, 3])
def test_expected_gradient_is_the_policy_gradient(estimator: Estimator, size: int) -> None:
    """All groups of responses of up to three tokens, each weighted by its probability.

    The policy draws 0 (stop) or 1 at each of three steps. Dense rewards differ by step and token, scores by response.
    """
    generator = torch.Generator().manual_seed(3)
    logits, dense = torch.randn(2, 3, 2, dtype=torch.float64, generator=generator)
    logits.requires_grad_()
    scores = torch.randn(4, dtype=torch.float64, generator=generator)
    tokens = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
    mask = torch.tensor([[True, False, False], [True, True, False], [True, True, True], [True, True, True]])

    steps = torch.arange(3)
    logprobs = logits.log_softmax(dim=1)[steps, tokens] * mask
    probabilities = logprobs.sum(dim=1).exp()
    terms = RewardTerms(
        token=dense[steps, tokens] * mask,
        kl=torch.zeros_like(dense[steps, tokens]),
        score=place_at_last_token(scores, mask),
    )
    (expected,) = torch.autograd.grad(probabilities @ terms.total.sum(dim=1), logits, retain_graph=True)

    drawn = torch.tensor(list(itertools.product(range(4), repeat=size)))
    rows = drawn.flatten()
    group_terms = RewardTerms(token=terms.token[rows], kl=terms.kl[rows], score=terms.score[rows])
    advantages, _ = estimate_advantages(estimator, group_terms, mask[rows], 1.0, 1.0, group_size=size)
    surrogate = (advantages * logprobs[rows]).sum(dim=1).view(-1, size).mean(dim=1)
    weights = probabilities.detach()[drawn].prod(dim=1)
    (gradient,) = torch.autograd.grad(weights @ surrogate, logits)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


@given(groups(), UNIT, UNIT)
def test_estimators_without_groups_are_the_functions_they_name(
    drawn: tuple[Batch, int], gamma: float, lam: float
) -> None:
    batch, _ = drawn
    terms, values = reward_terms(batch), batch.normal()
    advantages, returns = estimate_advantages("gae", terms, batch.mask, gamma, lam, values)
    expected = generalized_advantages(terms.total, values, batch.mask, gamma, lam)
    assert torch.equal(advantages, expected[0]) and torch.equal(returns, expected[1])
    advantages, returns = estimate_advantages("reinforce++", terms, batch.mask, gamma, lam)
    assert torch.equal(advantages, return_to_go(terms.total, batch.mask, gamma))
    assert torch.equal(advantages, returns)


@given(groups(), ESTIMATORS)
def test_garbage_outside_the_mask_changes_nothing(drawn: tuple[Batch, int], estimator: Estimator) -> None:
    batch, size = drawn
    terms, values = reward_terms(batch), batch.normal()
    spoilt = RewardTerms(token=batch.spoil(terms.token), kl=batch.spoil(terms.kl), score=batch.spoil(terms.score))
    clean = estimate_advantages(estimator, terms, batch.mask, 0.9, 0.9, values, size)
    dirty = estimate_advantages(estimator, spoilt, batch.mask, 0.9, 0.9, batch.spoil(values), size)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
        assert not a[~batch.mask].any()


def test_equal_responses_have_no_advantage() -> None:
    mask = torch.ones(3, 4, dtype=torch.bool)
    terms = RewardTerms(token=torch.ones(3, 4), kl=torch.zeros(3, 4), score=place_at_last_token(torch.ones(3), mask))
    for estimator in GROUP_ESTIMATORS:
        assert not estimate_advantages(estimator, terms, mask, 1.0, 1.0, group_size=3)[0].any()


@pytest.mark.parametrize(
    ("estimator", "size", "reason"),
    [("gae", 1, "needs values"), ("rloo", 1, "groups of 1"), ("grpo", 3, "groups of 3"), ("vpg", 2, "unknown.*vpg")],
)
def test_what_is_refused(estimator: Estimator, size: int, reason: str) -> None:
    nothing, mask = torch.zeros(4, 2), torch.ones(4, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=reason):
        estimate_advantages(estimator, RewardTerms(nothing, nothing, nothing), mask, 1.0, 1.0, group_size=size)


@pytest.mark.parametrize("estimator", sorted(GROUP_ESTIMATORS))
def test_groups_are_never_guessed(estimator: Estimator) -> None:
    nothing, mask = torch.zeros(4, 2), torch.ones(4, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="give a group_size of at least 2"):
        estimate_advantages(estimator, RewardTerms(nothing, nothing, nothing), mask, 1.0, 1.0)
