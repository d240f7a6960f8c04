"""Sampling: the right distribution, the right masks, and no dependence on batching."""

import pytest
import torch

from rto_lightning.backbone import Sequences
from rto_lightning.rollout import RolloutSettings, Trajectory, TransformersEngine, sample_seeds
from rto_lightning.rollout.sampling import SeededSampling
from tests.models import make_backbone


@pytest.fixture(scope="module")
def backbone(tiny_model):
    backbone = make_backbone(tiny_model, dtype="float32")
    backbone.add_role("reference")
    backbone.add_role("policy", trainable=True)
    return backbone


def _prompts(rows):
    sequences = Sequences.from_lists(rows, [[2]] * len(rows), pad_id=2)
    width = sequences.prompt_width
    return sequences.input_ids[:, :width], sequences.attention_mask[:, :width]


def _responses(trajectory):
    s = trajectory.sequences
    return [ids[mask].tolist() for ids, mask in zip(s.response_ids, s.response_mask, strict=True)]


def test_samples_follow_the_softmax():
    """Chi-squared over 20,000 draws; the bound is the 0.9999 quantile for 5 degrees of freedom."""
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0, -torch.inf, 0.5, -0.4])
    draws = 20_000
    processor = SeededSampling(list(range(draws)), max_new_tokens=1, temperature=0.8)
    tokens = processor(torch.empty(draws, 0), logits.expand(draws, -1)).argmax(-1)
    expected = (logits / 0.8).softmax(-1) * draws
    observed = torch.bincount(tokens, minlength=7).float()
    assert observed[4] == 0
    keep = expected > 0
    assert ((observed - expected)[keep] ** 2 / expected[keep]).sum() < 25.7


@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_samples_do_not_depend_on_the_batch(backbone, batch_size):
    ids, mask = _prompts([[1, 40, 41, 42, 43], [1, 50], [1, 60, 61]])
    seeds = [11, 12, 13]
    one_by_one = []
    for row, seed in enumerate(seeds):
        keep = mask[row].bool()
        engine = TransformersEngine(backbone, RolloutSettings(max_new_tokens=20))
        alone = engine.rollout("policy", ids[row][keep][None], mask[row][keep][None], [seed])
        one_by_one += _responses(alone)
    engine = TransformersEngine(backbone, RolloutSettings(max_new_tokens=20, batch_size=batch_size))
    assert _responses(engine.rollout("policy", ids, mask, seeds)) == one_by_one


def test_model_defaults_do_not_distort_the_samples(backbone):
    """The tiny model ships top_k 1 and temperature 0.1, with which every seed would give the same response."""
    ids, mask = _prompts([[1, 40, 41]] * 8)
    engine = TransformersEngine(backbone, RolloutSettings(max_new_tokens=8))
    assert len(set(map(tuple, _responses(engine.rollout("policy", ids, mask, list(range(8))))))) > 4


def test_temperature_zero_is_greedy(backbone):
    ids, mask = _prompts([[1, 40, 41]])
    engine = TransformersEngine(backbone, RolloutSettings(max_new_tokens=5, temperature=0.0))
    trajectory = engine.rollout("reference", ids, mask, [0])
    tokens = ids
    for _ in range(trajectory.sequences.response_width):
        with torch.no_grad(), backbone.play("reference") as model:
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(trajectory.sequences.input_ids, tokens)


def test_gradient_checkpointing_does_not_change_samples(tiny_model, backbone):
    ids, mask = _prompts([[1, 40, 41]])
    other = make_backbone(tiny_model, dtype="float32", gradient_checkpointing=True)
    other.add_role("policy", trainable=True)
    other.train()
    settings = RolloutSettings(max_new_tokens=10)
    expected = TransformersEngine(backbone, settings).rollout("policy", ids, mask, [3])
    assert _responses(TransformersEngine(other, settings).rollout("policy", ids, mask, [3])) == _responses(expected)
    assert all(module.training for module in other.modules())


def test_masks_come_from_the_first_stop_though_padding_is_a_stop_too():
    prompt_mask = torch.ones(3, 1, dtype=torch.int64)
    tokens = torch.tensor([[9, 5, 2, 2, 2], [9, 2, 2, 2, 2], [9, 5, 6, 7, 8]])
    trajectory = Trajectory.from_tokens(tokens, prompt_mask, stop_ids=(2, 3))
    assert trajectory.sequences.response_lengths.tolist() == [2, 1, 4]
    assert trajectory.truncated.tolist() == [False, False, True]
    assert trajectory.sequences.attention_mask.sum(1).tolist() == [3, 2, 5]


def test_any_stop_id_ends_a_response():
    tokens = torch.tensor([[9, 5, 3, 7], [9, 5, 6, 2]])
    trajectory = Trajectory.from_tokens(tokens, torch.ones(2, 1, dtype=torch.int64), stop_ids=(2, 3))
    assert trajectory.sequences.response_lengths.tolist() == [2, 3]
    assert not trajectory.truncated.any()


def test_a_stop_as_last_token_is_not_truncated():
    tokens = torch.tensor([[9, 5, 6, 2]])
    assert not Trajectory.from_tokens(tokens, torch.ones(1, 1, dtype=torch.int64), (2,)).truncated.any()


def test_seeds_differ_by_run_iteration_row_and_occurrence():
    index = torch.tensor([0, 1, 0])
    seeds = [s for seed in (1, 2) for iteration in (0, 1) for s in sample_seeds(seed, iteration, index)]
    assert len(set(seeds)) == 12
    assert sample_seeds(1, 0, index) == sample_seeds(1, 0, index)
    assert sample_seeds(1, 0, torch.tensor([1])) == sample_seeds(1, 0, index)[1:2]
