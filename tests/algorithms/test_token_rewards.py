import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rto_lightning.algorithms import Granularity, clamp_magnitude, move_token_rewards, token_rewards

from .strategies import Batch, batches


def test_scale_comes_before_clip() -> None:
    dpo = torch.tensor([[0.5, 2.0, -3.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False]])
    rewards = token_rewards(dpo, torch.zeros_like(dpo), mask, beta_1=0.05, clip=0.05)
    # Clipping first would leave 0.05 * 0.05 = 0.0025 everywhere.
    torch.testing.assert_close(rewards, torch.tensor([[0.025, 0.05, -0.05, 0.0]], dtype=torch.float64))


@given(batches(), st.floats(0.01, 2), st.floats(0.01, 0.5))
def test_clip_bounds_and_leaves_small_rewards_alone(batch: Batch, beta_1: float, clip: float) -> None:
    dpo, reference = batch.logprobs(), batch.logprobs()
    exact = token_rewards(dpo, reference, batch.mask, beta_1, clip=0)
    torch.testing.assert_close(exact, batch.mask * beta_1 * (dpo - reference))
    clipped = token_rewards(dpo, reference, batch.mask, beta_1, clip)
    small = exact.abs() <= clip
    assert torch.equal(clipped[small], exact[small])
    assert torch.equal(clipped[~small], exact[~small].sign() * clip)


@given(batches())
def test_scale_zero_is_no_reward(batch: Batch) -> None:
    assert not token_rewards(batch.logprobs(), batch.logprobs(), batch.mask, beta_1=0.0, clip=0.05).any()


@given(batches(), st.sampled_from([0.0, 0.05]))
def test_exchanging_the_policies_changes_the_sign(batch: Batch, clip: float) -> None:
    dpo, reference = batch.logprobs(), batch.logprobs()
    there = token_rewards(dpo, reference, batch.mask, 0.05, clip)
    back = token_rewards(reference, dpo, batch.mask, 0.05, clip)
    assert torch.equal(there, -back)


@given(batches(), st.sampled_from([0.0, 0.05]))
def test_garbage_outside_the_mask_changes_nothing(batch: Batch, clip: float) -> None:
    dpo, reference = batch.logprobs(), batch.logprobs()
    clean = token_rewards(dpo, reference, batch.mask, 0.05, clip)
    assert torch.equal(token_rewards(batch.spoil(dpo), batch.spoil(reference), batch.mask, 0.05, clip), clean)
    assert not clean[~batch.mask].any()


def test_negative_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be negative"):
        clamp_magnitude(torch.zeros(2), -1.0)


# move_token_rewards

REWARDS = torch.tensor([[1.0, 2.0, 4.0, 8.0, torch.nan], [16.0, torch.nan, torch.nan, torch.nan, torch.nan]])
MASK = ~REWARDS.isnan()
ENDS = torch.tensor([[False, True, False, False, True], [False, True, False, False, False]])


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [
        ("token", [[1.0, 2.0, 4.0, 8.0, 0.0], [16.0, 0.0, 0.0, 0.0, 0.0]]),
        ("sentence", [[0.0, 3.0, 0.0, 12.0, 0.0], [16.0, 0.0, 0.0, 0.0, 0.0]]),
        ("delayed", [[0.0, 0.0, 0.0, 15.0, 0.0], [16.0, 0.0, 0.0, 0.0, 0.0]]),
        ("shaping", [[1.0, 2.0, 4.0, -7.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]]),
    ],
)
def test_granularities_by_hand(granularity: Granularity, expected: list[list[float]]) -> None:
    assert move_token_rewards(REWARDS, MASK, granularity, ENDS).tolist() == expected


@given(batches(), st.integers(0, 2**30 - 1))
def test_each_sentence_is_summed_on_its_end(batch: Batch, bits: int) -> None:
    rewards = batch.normal()
    ends = (torch.tensor(bits) >> torch.arange(batch.mask.numel())).bitwise_and(1).bool().view_as(batch.mask)
    expected = torch.zeros_like(rewards)
    for row, length in enumerate(batch.mask.sum(dim=1).tolist()):
        total = 0.0
        for t in range(length):
            total += rewards[row, t].item()
            if ends[row, t] or t == length - 1:
                expected[row, t], total = total, 0.0
    torch.testing.assert_close(move_token_rewards(batch.spoil(rewards), batch.mask, "sentence", ends), expected)


@given(batches(), st.sampled_from(["token", "sentence", "delayed", "shaping"]))
def test_moving_keeps_the_sum_of_a_response_and_shaping_makes_it_zero(batch: Batch, granularity: Granularity) -> None:
    rewards = batch.normal()
    ends = batch.normal() > 0
    moved = move_token_rewards(batch.spoil(rewards), batch.mask, granularity, ends)
    sums = torch.zeros(len(rewards)).double() if granularity == "shaping" else (rewards * batch.mask).sum(dim=1)
    torch.testing.assert_close(moved.sum(dim=1), sums)
    assert not moved[~batch.mask].any()


@given(batches())
def test_one_sentence_is_delayed_and_a_sentence_a_token_is_token(batch: Batch) -> None:
    rewards = batch.normal()
    no_ends, all_ends = torch.zeros_like(batch.mask), torch.ones_like(batch.mask)
    delayed = move_token_rewards(rewards, batch.mask, "delayed")
    torch.testing.assert_close(move_token_rewards(rewards, batch.mask, "sentence", no_ends), delayed)
    assert torch.equal(move_token_rewards(rewards, batch.mask, "sentence", all_ends), rewards * batch.mask)


def test_sums_of_sentences_keep_their_digits_in_float32() -> None:
    """A large sentence before a small one; a difference of running sums would leave 0 of the small one."""
    rewards = torch.tensor([[1e8, 1.0, 1.0]])
    ends = torch.tensor([[True, False, True]])
    assert move_token_rewards(rewards, torch.ones_like(ends), "sentence", ends).tolist() == [[1e8, 0.0, 2.0]]


def test_ends_outside_the_mask_are_none() -> None:
    mask = torch.tensor([[True, False, True, True]])
    moved = move_token_rewards(torch.tensor([[1.0, torch.nan, 2.0, 4.0]]), mask, "sentence", ~mask)
    assert moved.tolist() == [[0.0, 0.0, 0.0, 7.0]]


def test_left_padding_is_no_sentence() -> None:
    mask = torch.tensor([[False, True, True]])
    moved = move_token_rewards(torch.tensor([[torch.nan, 1.0, 2.0]]), mask, "sentence", torch.zeros_like(mask))
    assert moved.tolist() == [[0.0, 0.0, 3.0]]


def test_sentences_need_their_ends() -> None:
    with pytest.raises(ValueError, match="sentence_ends"):
        move_token_rewards(REWARDS, MASK, "sentence")


def test_unknown_granularity() -> None:
    with pytest.raises(ValueError, match="word"):
        move_token_rewards(REWARDS, MASK, "word")  # type: ignore[arg-type]
