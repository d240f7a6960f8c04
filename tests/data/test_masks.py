"""What masks and paddings promise over any rows of tokens: special ones anywhere, padding that is the stop token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rto_lightning.backbone.sequences import Sequences
from rto_lightning.rollout import Trajectory
from tests.models import make_backbone

PAD = STOP = 2
ids = st.sampled_from([0, 1, PAD, 40, 41]) | st.integers(3, 258)
rows = st.lists(st.tuples(st.lists(ids, min_size=1, max_size=8), st.lists(ids, max_size=8)), min_size=1, max_size=5)


def batch_of(pairs):
    return Sequences.from_lists(*zip(*pairs, strict=True), pad_id=PAD)


@given(rows)
def test_masks_follow_from_lengths_alone(pairs):
    batch = batch_of(pairs)
    assert batch.prompt_lengths.tolist() == [len(prompt) for prompt, _ in pairs]
    assert batch.response_lengths.tolist() == [len(response) for _, response in pairs]
    assert batch.prompt_width == max(len(prompt) for prompt, _ in pairs)
    assert batch.response_width == max(len(response) for _, response in pairs)
    for (prompt, response), tokens, attention, mask in zip(
        pairs, batch.input_ids, batch.attention_mask.bool(), batch.response_mask, strict=True
    ):
        assert tokens[attention].tolist() == prompt + response
        assert (tokens[~attention] == PAD).all()
        assert attention.int().diff().abs().sum() <= 2  # one stretch, without gaps
        assert tokens[batch.prompt_width :][mask].tolist() == response
        assert torch.equal(attention[batch.prompt_width :], mask)


@given(rows)
def test_left_aligned_rows_begin_with_the_prompt(pairs):
    aligned = batch_of(pairs).left_aligned()
    assert aligned.shape == (len(pairs), max(len(prompt) + len(response) for prompt, response in pairs))
    for (prompt, response), row in zip(pairs, aligned, strict=True):
        assert row[: len(prompt) + len(response)].tolist() == prompt + response


@given(rows, st.data())
def test_chosen_rows_are_those_rows(pairs, data):
    chosen = data.draw(st.lists(st.integers(0, len(pairs) - 1), min_size=1, max_size=6))
    part, whole = batch_of(pairs).rows(chosen), batch_of(pairs)
    for name in ("input_ids", "attention_mask", "response_mask"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[chosen])
    assert part.prompt_width == whole.prompt_width


@given(st.lists(st.lists(ids, min_size=5, max_size=5), min_size=1, max_size=5), st.sets(ids, min_size=1, max_size=3))
def test_a_sampled_response_ends_with_its_first_stop(sampled, stop_ids):
    prompt = torch.tensor([[PAD, 40]] * len(sampled))
    tokens = torch.cat([prompt, torch.tensor(sampled)], dim=1)
    trajectory = Trajectory.from_tokens(tokens, torch.tensor([[0, 1]] * len(sampled)), tuple(stop_ids))
    for row, mask, truncated in zip(
        trajectory.sequences.response_ids, trajectory.sequences.response_mask, trajectory.truncated, strict=True
    ):
        response = row[mask].tolist()
        assert truncated == stop_ids.isdisjoint(response)
        assert stop_ids.isdisjoint(response[:-1])
        assert not truncated or len(response) == 5
    for response, row in zip(sampled, trajectory.sequences.response_ids.tolist(), strict=True):
        assert row == response[: len(row)]  # no sampled token is rewritten, not even behind the stop


@pytest.fixture(scope="module")
def backbone(tiny_model):
    backbone = make_backbone(tiny_model)
    backbone.add_role("policy")
    return backbone


class TestLogProbabilities:
    @settings(max_examples=40, deadline=None)
    @given(pairs=rows)
    @torch.no_grad()
    def test_of_a_row_do_not_depend_on_its_batch(self, backbone, pairs):
        together, _ = backbone.token_logprobs("policy", batch_of(pairs))
        for pair, of_row in zip(pairs, together, strict=True):
            alone, _ = backbone.token_logprobs("policy", batch_of([pair]))
            length = len(pair[1])
            torch.testing.assert_close(of_row[:length], alone[0, :length], rtol=1e-9, atol=1e-9)
            assert (of_row[length:] == 0).all()
        assert together.isfinite().all()

    def test_of_a_row_without_a_prompt_are_refused(self, backbone):
        with pytest.raises(ValueError, match="a prompt has no tokens"):
            backbone.token_logprobs("policy", batch_of([([40], [41]), ([], [41])]))
