import pytest
import torch

from rto_lightning.backbone.sequences import Sequences


def test_prompts_are_padded_left_and_responses_right():
    batch = Sequences.from_lists([[5, 6, 7], [8]], [[1, 2], [3, 4, 2]], pad_id=2)
    assert batch.input_ids.tolist() == [[5, 6, 7, 1, 2, 2], [2, 2, 8, 3, 4, 2]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]
    assert batch.response_mask.tolist() == [[True, True, False], [True, True, True]]
    assert (batch.prompt_width, batch.response_width) == (3, 3)
    assert batch.response_ids.tolist() == [[1, 2, 2], [3, 4, 2]]
    assert batch.response_lengths.tolist() == [2, 3]


def test_dtypes():
    batch = Sequences.from_lists([[1]], [[2]], pad_id=0)
    assert batch.input_ids.dtype == batch.attention_mask.dtype == batch.response_lengths.dtype == torch.int64
    assert batch.response_mask.dtype == torch.bool


@pytest.mark.parametrize("index", [[1], torch.tensor([1]), slice(1, 2), torch.tensor([False, True])])
def test_rows_keep_their_widths(index):
    batch = Sequences.from_lists([[5, 6], [8]], [[1, 2], [3]], pad_id=0).rows(index)
    assert batch.input_ids.tolist() == [[0, 8, 3, 0]]
    assert batch.prompt_width == 2


def test_empty_responses_and_no_rows():
    assert Sequences.from_lists([[1, 2], [3]], [[], []], pad_id=0).response_ids.shape == (2, 0)
    assert Sequences.from_lists([], [], pad_id=0).input_ids.shape == (0, 0)


def test_to_moves_every_tensor():
    moved = Sequences.from_lists([[1]], [[2]], pad_id=0).to("meta")
    assert {t.device.type for t in (moved.input_ids, moved.attention_mask, moved.response_mask)} == {"meta"}


def test_prompts_and_responses_must_pair():
    with pytest.raises(ValueError, match="2 prompts do not pair with 1 responses"):
        Sequences.from_lists([[1], [2]], [[1]], pad_id=0)


def test_left_aligned_rows_are_prompt_and_response_without_a_gap():
    """The third row is the shortest: what follows its end is padding of any value."""
    batch = Sequences.from_lists([[5, 6, 7], [8], [9]], [[1, 2], [3, 4, 2], [2]], pad_id=0)
    aligned = batch.left_aligned()
    assert aligned.shape == (3, 5) and batch.input_ids.shape == (3, 6)
    assert aligned[0].tolist() == [5, 6, 7, 1, 2]
    assert aligned[1, :4].tolist() == [8, 3, 4, 2]
    assert aligned[2, :2].tolist() == [9, 2]
    assert batch.prompt_lengths.tolist() == [3, 1, 1]
