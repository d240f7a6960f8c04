"""The arithmetic of the benchmark on curves whose answers are known."""

import math
import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.benchmarks.summary import gold_at_kl, interval, method_summary, share_to_reach, trailing_means

FINITE = st.floats(-100, 100, allow_nan=False)


def run(seed: int, gold: list[float | None], kl: list[float | None] | None = None, **more: Any) -> dict[str, Any]:
    """A run whose final figures are those of its last iteration."""
    kl = kl or [float(i) for i in range(len(gold))]
    test = {"gold": gold[-1], "kl": kl[-1], "length": 10.0}
    return {"seed": seed, "error": None, "diverged": False, "curves": {"gold": gold, "kl": kl}, "test": test, **more}


def failed(seed: int) -> dict[str, Any]:
    """A run that ended in an error."""
    return {"seed": seed, "error": "ValueError: nan", "diverged": False, "curves": None, "test": None}


def test_interval_of_five_seeds_is_students() -> None:
    result = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert result is not None and result.n == 5
    # Standard deviation sqrt(2.5), t quantile 2.776 for 4 degrees of freedom.
    assert result.mean == 3.0
    assert result.high == pytest.approx(3.0 + 2.776 * math.sqrt(2.5 / 5))
    assert result.low == pytest.approx(3.0 - 2.776 * math.sqrt(2.5 / 5))


def test_interval_leaves_out_missing_seeds_and_counts_the_rest() -> None:
    result = interval([None, 2.0, None, 4.0])
    assert result is not None and (result.mean, result.n) == (3.0, 2)
    assert result.high == pytest.approx(3.0 + 12.706)
    assert interval([None]) is None
    single = interval([7.0])
    assert single is not None and (single.mean, single.low, single.n) == (7.0, None, 1)


def test_interval_refuses_more_seeds_than_it_has_quantiles_for() -> None:
    assert interval([0.0, 1.0] * 5) is not None
    with pytest.raises(ValueError, match="11 seeds"):
        interval([0.0] * 11)


@given(st.lists(FINITE, min_size=1, max_size=12), st.integers(1, 5))
def test_trailing_means_are_means_of_the_window(curve: list[float], window: int) -> None:
    means = trailing_means(curve, window)
    assert len(means) == len(curve)
    for end, mean in enumerate(means, start=1):
        if end < window:
            assert mean is None
        else:
            assert mean == pytest.approx(statistics.fmean(curve[end - window : end]))


def test_a_value_that_is_not_finite_has_no_mean_in_any_window_that_holds_it() -> None:
    assert trailing_means([1.0, None, 3.0, 5.0], 2) == [None, None, None, 4.0]


def test_share_is_that_of_the_first_iteration_at_the_level() -> None:
    curve = [0.0, 2.0, 4.0, 6.0, 8.0, 8.0, 8.0, 8.0]
    # Means of two: -, 1, 3, 5, 7, 8, ...
    assert share_to_reach(curve, 5.0, 2) == 4 / 8
    assert share_to_reach(curve, 5.01, 2) == 5 / 8
    assert share_to_reach(curve, -1.0, 2) == 2 / 8
    assert share_to_reach(curve, 8.01, 2) is None


@given(st.lists(FINITE, min_size=5, max_size=40))
def test_a_run_reaches_its_own_end(curve: list[float]) -> None:
    end = trailing_means(curve)[-1]
    assert end is not None
    share = share_to_reach(curve, end)
    assert share is not None and 0 < share <= 1


def test_gold_at_kl_interpolates_at_the_first_passage() -> None:
    kl = [0.0, 1.0, 3.0, 2.0, 4.0]
    gold = [0.0, 10.0, 20.0, 100.0, 200.0]
    assert gold_at_kl(gold, kl, 2.0, 1) == pytest.approx(15.0)
    assert gold_at_kl(gold, kl, 0.25, 1) == pytest.approx(2.5)
    assert gold_at_kl(gold, kl, 4.5, 1) is None
    assert gold_at_kl(gold, kl, -0.5, 1) is None
    assert gold_at_kl([1.0, 3.0], [2.0, 2.0], 2.0, 1) == 1.0


def test_the_baseline_beside_itself() -> None:
    runs = [run(seed, [float(seed), 1.0, 2.0, 3.0, 4.0, 5.0 + seed]) for seed in (3, 4)]
    line = method_summary(runs, runs, window=2)
    assert (line["runs"], line["reached"], line["failed"], line["diverged"]) == (2, 2, 0, 0)
    assert line["share"]["mean"] == line["share_ratio"]["mean"] == 1.0
    assert line["gold_difference"]["mean"] == line["gold_difference"]["high"] == 0.0
    assert line["gold"]["mean"] == pytest.approx(8.5)
    assert line["length"]["mean"] == 10.0


def test_a_faster_method_needs_a_smaller_share() -> None:
    ppo = [run(seed, [0.0, 1.0, 2.0, 2.0]) for seed in (3, 4)]
    fast = [run(3, [0.0, 2.0, 4.0, 4.0]), run(4, [0.0, 0.0, 1.0, 1.0])]
    line = method_summary(fast, ppo, window=1)
    # Seed 3 is there after 2 of 4 iterations, seed 4 never; PPO itself after 3.
    assert line["share"]["mean"] == pytest.approx((2 / 4 + 1) / 2)
    assert line["reached"] == 1
    assert line["share_ratio"]["mean"] == pytest.approx((2 / 3 + 4 / 3) / 2)
    assert line["gold_difference"]["mean"] == pytest.approx((2.0 - 1.0) / 2)
    # PPO ends with KL 3 and gold 2, the method is at gold 4 and 1 there.
    assert line["gold_at_kl"]["mean"] == pytest.approx(2.5)
    assert line["gold_at_kl_difference"]["mean"] == pytest.approx(0.5)


def test_failures_are_counted_and_cost_the_whole_share() -> None:
    ppo = [run(seed, [0.0, 1.0, 2.0]) for seed in (3, 4)]
    line = method_summary([run(3, [2.0, 2.0, 2.0], diverged=True), failed(4)], ppo, window=1)
    assert (line["runs"], line["failed"], line["diverged"], line["reached"]) == (2, 1, 1, 1)
    assert line["share"]["mean"] == pytest.approx((1 / 3 + 1) / 2)
    assert line["gold"]["n"] == 1


def test_a_seed_without_a_baseline_is_not_compared() -> None:
    line = method_summary([run(3, [1.0, 2.0]), run(4, [1.0, 2.0])], [failed(3), run(4, [0.0, 1.0])], window=1)
    assert (line["share"]["n"], line["gold_difference"]["n"], line["reached"]) == (1, 1, 1)
    assert line["gold"]["n"] == 2


def test_a_gold_reward_of_zero_is_a_value() -> None:
    line = method_summary([run(3, [0.0, 0.0])], [run(3, [0.0, 0.0])], window=1)
    assert line["gold"]["n"] == line["gold_difference"]["n"] == line["gold_at_kl"]["n"] == 1
