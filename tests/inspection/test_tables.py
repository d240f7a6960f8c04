"""Means, correlations and rankings of token rewards, on responses made by hand."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rto_lightning.algorithms import fractional_ranks
from rto_lightning.errors import UserError
from rto_lightning.inspection import (
    RewardedPair,
    agreement,
    by_position,
    by_sentence_place,
    by_token,
    clustered_correlation,
    extreme_tokens,
    margin_after_divergence,
    means_text,
    pair_ranking,
    score_correlation,
)
from rto_lightning.inspection.responses import as_responses
from rto_lightning.inspection.summary import RewardSummary
from tests.inspection.made import STOP, pair, rewarded

TWO = [rewarded(["a", "b", "a"], [1.0, -2.0, 3.0], "p"), rewarded(["a", "b"], [5.0, -4.0], "q")]


def test_means_by_token() -> None:
    rows = by_token(TWO, min_count=1)
    assert [(row.name, row.count, row.mean) for row in rows] == [("a", 3, 3.0), ("b", 2, -3.0)]
    # Residual sums of "a" by prompt are -2 and 2: s^2 = 2/1 * 8/9.
    assert rows[0].high - rows[0].mean == pytest.approx(1.96 * math.sqrt(2 * 8 / 9))
    assert by_token(TWO, min_count=3) == rows[:1]
    assert math.isnan(by_token(TWO[:1], min_count=1)[0].low)  # one prompt says nothing of others


def test_tokens_of_one_character_are_one() -> None:
    rows = by_token([rewarded(["", "é", "!"], [0.5, 0.25, 1.0])], min_count=1)
    assert [(row.name, row.mean) for row in rows] == [("é", 0.75), ("!", 1.0)]


def test_extreme_tokens_are_sure_ones() -> None:
    responses = [
        rewarded(["sure", "wild", "bad", "zero"], [1.0, 9.0 * (-1) ** n, -1.0 - 0.01 * n, 0.0], f"p{n}")
        for n in range(9)
    ]
    up, down = extreme_tokens(responses, min_count=2)
    assert [row.name for row in up] == ["sure"] and [row.name for row in down] == ["bad"]
    assert extreme_tokens(responses, min_count=10) == ([], [])


def test_means_by_position() -> None:
    assert [(row.name, row.count, row.mean) for row in by_position(TWO)] == [
        ("1", 2, 3.0),
        ("2", 2, -3.0),
        ("3", 1, 3.0),
    ]
    assert [(row.name, row.count) for row in by_position(TWO, width=2)] == [("1 to 2", 4), ("3 to 4", 1)]


def test_means_by_place_in_a_sentence() -> None:
    response = rewarded(["A", " b", ".", " C", "!", STOP], [1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    rows = {row.name: (row.count, row.mean) for row in by_sentence_place([response])}
    assert rows == {
        "begins a sentence": (2, 4.5),
        "within a sentence": (1, 2.0),
        "ends a sentence": (2, 10.0),
        "special token": (1, 32.0),
    }


def test_margin_after_divergence() -> None:
    rows = margin_after_divergence([pair()], tokens=3)
    # " good" against " bad", "." against the stop, the stop against nothing
    assert [row.mean for row in rows] == pytest.approx([2.3, -0.3, 0.2])
    assert sum(row.mean for row in rows) == pytest.approx(pair().margin)
    chosen = rewarded(["a"], [1.0])
    assert RewardedPair(chosen, rewarded(["a", "b"], [1.0, 2.0])).first_divergence == 1
    assert RewardedPair(chosen, chosen).first_divergence == 1
    assert RewardedPair(chosen, rewarded(["b"], [1.0])).first_divergence == 0


def test_ranking_of_pairs() -> None:
    turned = RewardedPair(pair().rejected, pair().chosen)
    figures = pair_ranking([pair("a"), pair("b"), turned, pair("c")])
    assert figures["pairs"] == 4 and figures["token_rewards/accuracy"] == 0.75
    assert "score/accuracy" not in figures
    assert pair_ranking([pair("a", 1.0), pair("b", -1.0)])["score/accuracy"] == 0.5


def test_the_summary_says_what_the_tables_say() -> None:
    pairs = [pair(f"p{n}", score=1.0 + n) for n in range(5)]
    summary = RewardSummary()
    for part in (pairs[:2], pairs[2:]):
        summary.add(part)
    facts = summary.facts()
    assert facts["responses"] == "10" and facts["tokens"] == "45"
    assert facts["mean sum of a response"] == f"{statistics.fmean(r.total for r in as_responses(pairs)):+.3f}"
    assert facts["pairs that the summed token rewards rank as labelled"] == "100.0% (100.0% to 100.0%)"
    assert facts["correlation of the sums with the scores"] == str(score_correlation(as_responses(pairs)))


finite = st.floats(-100, 100, width=32)


@settings(deadline=None)
@given(st.lists(st.tuples(finite, finite, st.integers(0, 3)), min_size=3, max_size=30))
def test_correlation_is_that_of_the_statistics_module(rows: list[tuple[float, float, int]]) -> None:
    x, y, clusters = (list(column) for column in zip(*rows, strict=True))
    tensors = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64), torch.tensor(clusters)
    try:
        expected = statistics.correlation(x, y)
    except statistics.StatisticsError:  # a side does not vary
        assert math.isnan(clustered_correlation(*tensors).value)
        return
    found = clustered_correlation(*tensors)
    if not math.isnan(found.value):  # one that varies by rounding only
        assert found.value == pytest.approx(expected, abs=1e-6)
    ranked = clustered_correlation(*tensors, ranked=True).value
    places = [fractional_ranks(tensor).tolist() for tensor in tensors[:2]]
    assert ranked == pytest.approx(statistics.correlation(*places))


def test_the_interval_knows_of_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, generator=generator)
    y = x + torch.randn(40, generator=generator)
    each, many = torch.arange(40), 30
    alone = clustered_correlation(x, y, each)
    assert alone.low < alone.value < alone.high
    # The same responses many times over are no more evidence.
    repeated = clustered_correlation(x.repeat(many), y.repeat(many), each.repeat(many))
    assert repeated.value == pytest.approx(alone.value)
    assert repeated.high - repeated.low == pytest.approx(alone.high - alone.low, rel=1e-6)
    believed = clustered_correlation(x.repeat(many), y.repeat(many), torch.arange(40 * many))
    assert believed.high - believed.low < 0.3 * (alone.high - alone.low)


def test_agreement_of_two_models() -> None:
    first = [rewarded(["a", "b", "c"], [1.0, -1.0, 0.5], f"p{n}") for n in range(3)]
    second = [rewarded(["a", "b", "c"], [2.0, -2.0, -1.0 - n], f"p{n}") for n in range(3)]
    assert agreement(first, first).tokens.value == pytest.approx(1.0)
    found = agreement(first, second)
    assert found.same_sign == pytest.approx(2 / 3) and found.tokens.count == 9 and found.totals.count == 3
    assert found.tokens.value < 0.95 and math.isnan(found.totals.value)  # the first's sums do not vary
    with pytest.raises(UserError, match="other tokens"):
        agreement(first, second[:2])
    with pytest.raises(UserError, match="no score"):
        score_correlation(first)


def test_means_as_text() -> None:
    lines = means_text(by_token(TWO, min_count=1), "token").splitlines()
    assert lines[0].split() == ["token", "count", "mean", "95%", "interval"]
    assert lines[1].split()[:3] == ["a", "3", "+3.000"]
