import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rto_lightning.algorithms import (
    last_token_index,
    masked_mean,
    masked_sum,
    place_at_last_token,
    response_mask_from_lengths,
    zero_outside,
)

from .strategies import Batch, batches

MASK = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
X = torch.tensor([[1.0, 2.0, torch.nan], [4.0, torch.inf, -torch.inf], [torch.nan, torch.nan, torch.inf]])


def test_sums_and_means_by_hand() -> None:
    assert masked_sum(X, MASK).item() == 7.0
    assert masked_sum(X, MASK, dim=1).tolist() == [3.0, 4.0, 0.0]
    assert masked_sum(X, MASK, dim=0).tolist() == [5.0, 2.0, 0.0]
    assert masked_mean(X, MASK).item() == pytest.approx(7 / 3)
    assert masked_mean(X, MASK, dim=1).tolist() == [1.5, 4.0, 0.0]


@given(batches(), st.sampled_from([None, 0, 1]))
def test_garbage_outside_the_mask_changes_nothing(batch: Batch, dim: int | None) -> None:
    x = batch.normal()
    spoilt = batch.spoil(x)
    assert torch.equal(zero_outside(spoilt, batch.mask), x * batch.mask)
    assert torch.equal(masked_sum(spoilt, batch.mask, dim), masked_sum(x, batch.mask, dim))
    assert torch.equal(masked_mean(spoilt, batch.mask, dim), masked_mean(x, batch.mask, dim))


@given(batches())
def test_gradient_of_the_mean_is_the_mask(batch: Batch) -> None:
    x = batch.spoil(batch.normal()).requires_grad_()
    masked_mean(x, batch.mask).backward()
    torch.testing.assert_close(x.grad, batch.mask / batch.mask.sum().double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    x = X.to(dtype)
    assert zero_outside(x, MASK).dtype == masked_sum(x, MASK).dtype == masked_mean(x, MASK).dtype == dtype


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_mask_from_lengths_is_inverted_by_counting(lengths: list[int]) -> None:
    mask = response_mask_from_lengths(torch.tensor(lengths), 5)
    assert mask.dtype == torch.bool
    assert mask.shape == (len(lengths), 5)
    assert mask.sum(dim=1).tolist() == lengths
    assert last_token_index(mask).tolist() == [length - 1 for length in lengths]
    # Once False, a row stays False.
    assert not (mask[:, 1:] & ~mask[:, :-1]).any()


def test_last_token_need_not_follow_an_unbroken_run() -> None:
    assert last_token_index(torch.tensor([[False, True, False, True, False]])).tolist() == [3]


def test_place_at_last_token_by_hand() -> None:
    placed = place_at_last_token(torch.tensor([5.0, -6.0, 7.0]), MASK)
    assert placed.tolist() == [[0.0, 5.0, 0.0], [-6.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_place_at_last_token_ignores_the_score_of_an_empty_response() -> None:
    assert place_at_last_token(torch.tensor([torch.nan]), torch.tensor([[False, False]])).tolist() == [[0.0, 0.0]]


@given(batches(min_length=1))
def test_placed_scores_sum_to_the_scores(batch: Batch) -> None:
    scores = batch.scores()
    placed = place_at_last_token(scores, batch.mask)
    assert torch.equal(placed.sum(dim=1), scores)
    assert (placed != 0).sum(dim=1).eq(1).all()
    assert not placed[~batch.mask].any()


def test_scores_of_a_scalar_head_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        place_at_last_token(torch.zeros(3, 1), MASK)
