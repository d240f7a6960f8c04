import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rto_lightning.algorithms import (
    Aggregation,
    aggregate,
    explained_variance,
    kl_estimate,
    policy_loss,
    value_loss,
)

from .strategies import Batch, batches

AGGREGATIONS = st.sampled_from(["sequence", "token"])
ONE = torch.tensor([[True]])


def scalar(x: float) -> torch.Tensor:
    return torch.tensor([[x]], dtype=torch.float64)


def whole(batch: Batch, aggregation: Aggregation) -> torch.Tensor:
    """The denominator of the whole batch."""
    return batch.mask.any(dim=1).sum() if aggregation == "sequence" else batch.mask.sum()


# aggregate


def test_aggregations_by_hand() -> None:
    losses = torch.tensor([[1.0, 3.0, torch.nan], [8.0, torch.inf, torch.nan]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert aggregate(losses, mask, "sequence").item() == (2.0 + 8.0) / 2
    assert aggregate(losses, mask, "token").item() == (1.0 + 3.0 + 8.0) / 3
    assert aggregate(losses, mask, "sequence", denominator=4).item() == (2.0 + 8.0) / 4
    assert aggregate(losses, mask, "token", denominator=torch.tensor(6)).item() == (1.0 + 3.0 + 8.0) / 6


@given(batches(), AGGREGATIONS)
def test_parts_sum_to_the_whole(batch: Batch, aggregation: Aggregation) -> None:
    losses = batch.normal()
    parts = [
        aggregate(batch.spoil(losses)[rows], batch.mask[rows], aggregation, whole(batch, aggregation))
        for rows in torch.arange(len(losses)).tensor_split(2)
    ]
    torch.testing.assert_close(sum(parts), aggregate(losses, batch.mask, aggregation))


@given(batches(), AGGREGATIONS)
def test_empty_responses_do_not_count(batch: Batch, aggregation: Aggregation) -> None:
    losses = batch.normal()
    nothing = torch.zeros_like(batch.mask[:1])
    with_empty = aggregate(torch.cat([losses, losses[:1]]), torch.cat([batch.mask, nothing]), aggregation)
    torch.testing.assert_close(with_empty, aggregate(losses, batch.mask, aggregation))
    assert aggregate(losses[:1], nothing, aggregation).item() == 0


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 1000))
def test_aggregations_agree_on_equal_lengths(rows: int, width: int, seed: int) -> None:
    losses = torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(rows, width, dtype=torch.bool)
    torch.testing.assert_close(aggregate(losses, mask, "sequence"), losses.mean())
    torch.testing.assert_close(aggregate(losses, mask, "token"), losses.mean())


def test_unknown_aggregation() -> None:
    with pytest.raises(ValueError, match="batch"):
        aggregate(torch.zeros(1, 1), ONE, "batch")


# policy_loss


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "gradient", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, 0),
        (1.1, 2.0, -2.2, -2.2, 0),
        (1.5, 2.0, -2.4, 0.0, 1),
        (0.5, 2.0, -1.0, -1.0, 0),
        (0.9, -2.0, 1.8, 1.8, 0),
        (0.5, -2.0, 1.6, 0.0, 1),
        (1.5, -2.0, 3.0, 3.0, 0),
    ],
)
def test_policy_loss_of_one_token(
    ratio: float, advantage: float, expected: float, gradient: float, clipped: int
) -> None:
    """The gradient by the log-probability is -ratio * advantage, and zero on the clipped side."""
    logprobs = scalar(math.log(ratio) - 1).requires_grad_()
    loss, statistics = policy_loss(logprobs, scalar(-1), scalar(advantage), ONE, clip_range=0.2)
    loss.backward()
    assert logprobs.grad is not None
    assert loss.item() == pytest.approx(expected)
    assert logprobs.grad.item() == pytest.approx(gradient)
    assert statistics.clipped.item() == clipped
    assert statistics.ratio_deviation.item() == pytest.approx(abs(ratio - 1), abs=1e-12)
    assert statistics.approximate_kl.item() == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-12)
    assert statistics.tokens.item() == 1


@given(batches(), AGGREGATIONS)
def test_first_update_is_the_policy_gradient(batch: Batch, aggregation: Aggregation) -> None:
    old, advantages = batch.logprobs(), batch.normal()
    logprobs = old.clone().requires_grad_()
    loss, statistics = policy_loss(logprobs, old, advantages, batch.mask, 0.2, aggregation)
    loss.backward()
    reinforce = old.clone().requires_grad_()
    aggregate(-reinforce * advantages, batch.mask, aggregation).backward()
    torch.testing.assert_close(logprobs.grad, reinforce.grad)
    torch.testing.assert_close(loss, aggregate(-advantages, batch.mask, aggregation))
    assert statistics.ratio_deviation == statistics.approximate_kl == statistics.clipped == 0


@given(batches(), AGGREGATIONS)
def test_policy_microbatches_sum_to_the_minibatch(batch: Batch, aggregation: Aggregation) -> None:
    logprobs, old, advantages = batch.logprobs(), batch.logprobs(), batch.normal()
    loss, statistics = policy_loss(logprobs, old, advantages, batch.mask, 0.2, aggregation)
    parts = [
        policy_loss(
            logprobs[row, None],
            old[row, None],
            advantages[row, None],
            batch.mask[row, None],
            0.2,
            aggregation,
            whole(batch, aggregation),
        )
        for row in range(len(logprobs))
    ]
    torch.testing.assert_close(sum(part for part, _ in parts), loss)
    total = parts[0][1]
    for _, part in parts[1:]:
        total = total + part
    for name in ("clipped", "approximate_kl", "ratio_deviation", "tokens"):
        torch.testing.assert_close(getattr(total, name), getattr(statistics, name))


@given(batches(min_padding=1), AGGREGATIONS)
def test_policy_loss_ignores_garbage_outside_the_mask(batch: Batch, aggregation: Aggregation) -> None:
    inputs = [batch.logprobs(), batch.logprobs(), batch.normal()]
    clean, clean_statistics = policy_loss(*inputs, batch.mask, 0.2, aggregation)
    logprobs, old, advantages = (batch.spoil(x) for x in inputs)
    logprobs.requires_grad_()
    loss, statistics = policy_loss(logprobs, old, advantages, batch.mask, 0.2, aggregation)
    loss.backward()
    assert torch.equal(loss, clean)
    assert statistics == clean_statistics
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()
    assert not logprobs.grad[~batch.mask].any()


@given(batches())
def test_policy_statistics_are_sums_over_tokens(batch: Batch) -> None:
    logprobs, old, advantages = batch.logprobs().requires_grad_(), batch.logprobs(), batch.normal()
    _, statistics = policy_loss(logprobs, old, advantages, batch.mask, 0.2)
    # Sampled from the old policy: KL(old || new).
    kl = kl_estimate(old, logprobs, batch.mask, "k3").sum()
    torch.testing.assert_close(statistics.approximate_kl, kl.detach())
    ratio = (logprobs - old)[batch.mask].exp()
    torch.testing.assert_close(statistics.ratio_deviation, (ratio - 1).abs().max().detach())
    outside = torch.where(advantages[batch.mask] > 0, ratio > 1.2, ratio < 0.8)
    assert statistics.clipped == outside.sum()
    assert statistics.tokens == batch.mask.sum()
    assert not any(x.requires_grad for x in vars(statistics).values())


@given(batches(min_length=1))
def test_clipping_never_lowers_the_loss(batch: Batch) -> None:
    inputs = (batch.logprobs(), batch.logprobs(), batch.normal(), batch.mask)
    assert policy_loss(*inputs, clip_range=0.2)[0] >= policy_loss(*inputs, clip_range=1e6)[0]


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "gradient", "clipped"),
    [
        (5.0, -2.0, 6.0, 0.0, 1),
        (2.9, -2.0, 5.8, 5.8, 0),
        (0.5, -2.0, 1.6, 0.0, 1),
        (0.9, -2.0, 1.8, 1.8, 0),
        (5.0, 2.0, -2.4, 0.0, 1),
        (0.5, 2.0, -1.0, -1.0, 0),
        (5.0, 0.0, 0.0, 0.0, 0),
    ],
)
def test_dual_clip_of_one_token(ratio: float, advantage: float, expected: float, gradient: float, clipped: int) -> None:
    """With c = 3 the loss of a negative advantage ends at 3 times its size; the other sides are as without."""
    logprobs = scalar(math.log(ratio) - 1).requires_grad_()
    loss, statistics = policy_loss(logprobs, scalar(-1), scalar(advantage), ONE, clip_range=0.2, dual_clip=3.0)
    loss.backward()
    assert logprobs.grad is not None
    assert loss.item() == pytest.approx(expected)
    assert logprobs.grad.item() == pytest.approx(gradient)
    assert statistics.clipped.item() == clipped


@given(batches(), st.floats(1.01, 5))
def test_dual_clip_is_the_equation(batch: Batch, dual_clip: float) -> None:
    logprobs, old, advantages = batch.logprobs().requires_grad_(), batch.logprobs(), batch.normal()
    loss, statistics = policy_loss(
        batch.spoil(logprobs), old, batch.spoil(advantages), batch.mask, 0.2, dual_clip=dual_clip
    )
    ratio = (logprobs - old).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    dual = torch.where(advantages < 0, torch.maximum(surrogate, dual_clip * advantages), surrogate)
    torch.testing.assert_close(loss, aggregate(-dual, batch.mask))
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(gradient, torch.autograd.grad(aggregate(-dual, batch.mask), logprobs)[0])
    assert statistics.clipped == (gradient[batch.mask] == 0).sum()


@given(batches())
def test_wide_dual_clip_changes_nothing(batch: Batch) -> None:
    inputs = (batch.logprobs(), batch.logprobs(), batch.normal(), batch.mask)
    plain, plain_statistics = policy_loss(*inputs, clip_range=0.2)
    loss, statistics = policy_loss(*inputs, clip_range=0.2, dual_clip=1e6)
    assert torch.equal(loss, plain)
    assert statistics == plain_statistics


@pytest.mark.parametrize("dual_clip", [1.0, 0.5, math.nan])
def test_dual_clip_must_be_above_1(dual_clip: float) -> None:
    with pytest.raises(ValueError, match="dual_clip"):
        policy_loss(scalar(-1), scalar(-1), scalar(1), ONE, 0.2, dual_clip=dual_clip)


# value_loss


@pytest.mark.parametrize(
    ("value", "target", "expected", "gradient", "clipped"),
    [
        (1.1, 3.0, 0.5 * 1.9**2, -1.9, 0),
        (2.0, 3.0, 0.5 * 1.8**2, 0.0, 1),
        (0.0, 3.0, 0.5 * 3.0**2, -3.0, 0),
        (0.0, -3.0, 0.5 * 3.8**2, 0.0, 1),
        (2.0, -3.0, 0.5 * 5.0**2, 5.0, 0),
    ],
)
def test_value_loss_of_one_token(value: float, target: float, expected: float, gradient: float, clipped: int) -> None:
    """Old value 1, range 0.2: no gradient once the value has left the range towards the return."""
    values = scalar(value).requires_grad_()
    loss, count = value_loss(values, scalar(1.0), scalar(target), ONE, value_clip_range=0.2)
    loss.backward()
    assert values.grad is not None
    assert loss.item() == pytest.approx(expected)
    assert values.grad.item() == pytest.approx(gradient)
    assert count.item() == clipped


@given(batches(), AGGREGATIONS)
def test_value_loss_without_clipping_is_half_the_squared_error(batch: Batch, aggregation: Aggregation) -> None:
    values, old, returns = batch.normal(), batch.normal(), batch.normal()
    loss, clipped = value_loss(values, old, returns, batch.mask, None, aggregation)
    torch.testing.assert_close(loss, aggregate((values - returns) ** 2 / 2, batch.mask, aggregation))
    assert clipped == 0
    wide, _ = value_loss(values, old, returns, batch.mask, 1e6, aggregation)
    torch.testing.assert_close(wide, loss)


def test_rounding_is_not_counted_as_clipping() -> None:
    """Inside the range ``old + (value - old)`` is not always ``value`` in float32."""
    generator = torch.Generator().manual_seed(1)
    values, old = 0.2 * torch.rand(2, 8, 32, generator=generator) - 0.1
    assert not torch.equal(old + (values - old), values)
    mask = torch.ones(8, 32, dtype=torch.bool)
    _, clipped = value_loss(values, old, torch.ones(8, 32), mask, value_clip_range=0.2)
    assert clipped == 0


@given(batches(), AGGREGATIONS)
def test_value_microbatches_sum_to_the_minibatch(batch: Batch, aggregation: Aggregation) -> None:
    inputs = [batch.normal(), batch.normal(), batch.normal(), batch.mask]
    loss, clipped = value_loss(*inputs, 0.2, aggregation)
    parts = [
        value_loss(*(x[row, None] for x in inputs), 0.2, aggregation, whole(batch, aggregation))
        for row in range(len(batch.mask))
    ]
    torch.testing.assert_close(sum(part for part, _ in parts), loss)
    assert sum(count for _, count in parts) == clipped


@given(batches(min_padding=1), AGGREGATIONS, st.sampled_from([None, 0.2]))
def test_value_loss_ignores_garbage_outside_the_mask(
    batch: Batch, aggregation: Aggregation, clip_range: float | None
) -> None:
    inputs = [batch.normal(), batch.normal(), batch.normal()]
    clean, clean_clipped = value_loss(*inputs, batch.mask, clip_range, aggregation)
    values, old, returns = (batch.spoil(x) for x in inputs)
    values.requires_grad_()
    loss, clipped = value_loss(values, old, returns, batch.mask, clip_range, aggregation)
    loss.backward()
    assert torch.equal(loss, clean)
    assert clipped == clean_clipped
    assert values.grad is not None
    assert values.grad.isfinite().all()
    assert not values.grad[~batch.mask].any()


# explained_variance


def test_explained_variance_by_hand() -> None:
    returns = torch.tensor([[1.0, 3.0, torch.nan], [5.0, 7.0, torch.inf]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    assert explained_variance(returns, returns, mask).item() == 1
    assert explained_variance(returns - 9, returns, mask).item() == 1
    assert explained_variance(returns / 2, returns, mask).item() == 0.75
    assert explained_variance(torch.full_like(returns, 4.0), returns, mask).item() == 0
    assert explained_variance(-returns, returns, mask).item() == -3
    assert explained_variance(returns, torch.full_like(returns, 2.0), mask).isnan()


@given(batches())
def test_explained_variance_ignores_garbage_outside_the_mask(batch: Batch) -> None:
    values, returns = batch.normal(), batch.normal()
    clean = explained_variance(values, returns, batch.mask)
    spoilt = explained_variance(batch.spoil(values), batch.spoil(returns), batch.mask)
    torch.testing.assert_close(spoilt, clean, rtol=0, atol=0, equal_nan=True)
    assert clean.isnan() == (batch.mask.sum() == 1)
