import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rto_lightning.algorithms import clustered_mean_interval, fractional_ranks

VALUES = st.lists(st.floats(-10, 10), min_size=2, max_size=12)


def doubles(numbers: list[float]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_two_clusters_by_hand() -> None:
    # Mean 2; residual sums -2 and 2; s^2 = 2/1 * (4 + 4) / 16 = 1.
    mean, low, high = clustered_mean_interval(doubles([0, 2, 2, 4]), torch.tensor([7, 7, 3, 3]), z=1.0)
    assert (mean.item(), low.item(), high.item()) == pytest.approx((2.0, 1.0, 3.0))


@given(VALUES, st.floats(0.5, 3))
def test_single_observations_have_the_usual_standard_error(numbers: list[float], z: float) -> None:
    values = doubles(numbers)
    mean, low, high = clustered_mean_interval(values, torch.arange(len(values)), z)
    half_width = z * values.std() / math.sqrt(len(values))
    torch.testing.assert_close(mean, values.mean())
    torch.testing.assert_close(low, mean - half_width, rtol=0, atol=1e-9)
    torch.testing.assert_close(high, mean + half_width, rtol=0, atol=1e-9)


@given(VALUES, st.integers(2, 4))
def test_copies_within_a_cluster_add_no_certainty(numbers: list[float], copies: int) -> None:
    values, clusters = doubles(numbers), torch.arange(len(numbers))
    once = clustered_mean_interval(values, clusters)
    repeated = clustered_mean_interval(values.repeat(copies), clusters.repeat(copies))
    for a, b in zip(once, repeated, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@given(st.lists(st.tuples(st.floats(-10, 10), st.integers(0, 3)), min_size=2, max_size=12), st.randoms())
def test_order_and_names_of_clusters_do_not_matter(rows: list[tuple[float, int]], random: object) -> None:
    values, clusters = doubles([value for value, _ in rows]), torch.tensor([cluster for _, cluster in rows])
    order = list(range(len(rows)))
    random.shuffle(order)  # type: ignore[attr-defined]
    first = clustered_mean_interval(values, clusters)
    second = clustered_mean_interval(values[order], 100 - 7 * clusters[order])
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9, equal_nan=True)


def test_95_percent_intervals_cover_in_95_of_100_cases() -> None:
    generator = torch.Generator().manual_seed(1)
    clusters = torch.arange(60).repeat_interleave(4)
    covered = naive = 0
    for _ in range(400):
        shared = torch.randn(60, dtype=torch.float64, generator=generator)[clusters]
        values = shared + torch.randn(240, dtype=torch.float64, generator=generator)
        _, low, high = clustered_mean_interval(values, clusters)
        covered += bool(low <= 0 <= high)
        _, low, high = clustered_mean_interval(values, torch.arange(240))
        naive += bool(low <= 0 <= high)
    assert 0.92 < covered / 400 < 0.98
    # Without the clusters the same data give intervals that are too narrow.
    assert naive / 400 < 0.85


def test_one_cluster_has_a_mean_but_no_interval() -> None:
    mean, low, high = clustered_mean_interval(doubles([1, 3]), torch.tensor([5, 5]))
    assert mean.item() == 2
    assert low.isnan()
    assert high.isnan()


def test_no_observations() -> None:
    assert all(x.isnan() for x in clustered_mean_interval(doubles([]), torch.tensor([], dtype=torch.int64)))


def test_equal_values_share_the_mean_of_their_places() -> None:
    places = fractional_ranks(torch.tensor([3.0, 1.0, 3.0, 2.0]))
    assert places.tolist() == [3.5, 1.0, 3.5, 2.0] and places.dtype == torch.float64


@given(VALUES)
def test_a_rank_counts_what_is_lower_and_half_of_the_equals(numbers: list[float]) -> None:
    for value, place in zip(numbers, fractional_ranks(doubles(numbers)).tolist(), strict=True):
        assert place == sum(other < value for other in numbers) + (numbers.count(value) + 1) / 2
