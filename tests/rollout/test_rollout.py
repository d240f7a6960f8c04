"""Sampling: the right distribution, the right masks, and no dependence on batching."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rto_lightning.backbone import Sequences
from rto_lightning.rollout import RolloutSettings, Trajectory, TransformersEngine
from tests.models import make_backbone, randomize
from tests.rollout.oracles import generated_responses

STOPS = tuple(range(0, 259, 12))  # the tiny model seldom samples its own stop id
PROMPTS = [[1, 40, 41, 42, 43], [1, 40, 41, 42, 43], [1, 50], [1, 50], [1, 50], [1, 60, 61], [1, 50], [1]]


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


@pytest.fixture(scope="module")
def exact(tiny_model):
    """In float64, where no rounding decides a draw; policy and critic have something to say."""
    backbone = _backbone(tiny_model, "adapters", "float64")
    alone = _rollout(backbone, PROMPTS, range(len(PROMPTS)), batch_size=1)
    return backbone, _responses(alone)


def _backbone(folder, mode, dtype, **changes):
    backbone = make_backbone(folder, mode=mode, dtype=dtype, **changes)
    backbone.chat.stop_ids = STOPS
    backbone.add_role("policy", trainable=True, scalar_head=True)
    randomize(backbone.trained_parameters("policy"))
    return backbone


def _rollout(
    backbone, prompts, seeds, *, extra_padding=0, max_new_tokens=16, temperature=0.9, batch_size=None, **asked
):
    ids, mask = (torch.nn.functional.pad(x, (extra_padding, 0)) for x in _prompts(prompts))
    engine = TransformersEngine(backbone, RolloutSettings(max_new_tokens, temperature, batch_size=batch_size))
    return engine.rollout("policy", ids, mask, list(seeds), **asked)


def test_responses_are_those_of_generate(exact):
    backbone, alone = exact
    assert {len(response) for response in alone} >= {16} and len({len(response) for response in alone}) > 2
    with backbone.play("policy") as model:
        model.eval()
        expected = generated_responses(model, PROMPTS, list(range(len(PROMPTS))), STOPS, 16, 0.9)
        model.train()
    assert alone == expected


@settings(deadline=None, max_examples=25)
@given(
    order=st.permutations(range(len(PROMPTS))),
    rows=st.integers(1, len(PROMPTS)),
    batch_size=st.one_of(st.none(), st.integers(1, len(PROMPTS))),
    extra_padding=st.integers(0, 3),
)
def test_a_response_depends_on_nothing_but_its_prompt_and_seed(exact, order, rows, batch_size, extra_padding):
    """Not on the rows beside it, their order, the padding or the batch size."""
    backbone, alone = exact
    order = order[:rows]
    trajectory = _rollout(
        backbone, [PROMPTS[row] for row in order], order, batch_size=batch_size, extra_padding=extra_padding
    )
    assert _responses(trajectory) == [alone[row] for row in order]
    assert trajectory.truncated.tolist() == [alone[row][-1] not in STOPS for row in order]
    ids, mask = (torch.nn.functional.pad(x, (extra_padding, 0)) for x in _prompts([PROMPTS[row] for row in order]))
    sequences = trajectory.sequences
    assert torch.equal(sequences.input_ids[:, : sequences.prompt_width], ids)
    assert torch.equal(sequences.attention_mask[:, : sequences.prompt_width], mask)
    assert sequences.response_width == max(len(alone[row]) for row in order)


@pytest.mark.parametrize("mode", ["adapters", "full"])
@pytest.mark.parametrize(
    ("dtype", "tolerance", "temperature", "batch_size"),
    [
        ("float32", 1e-5, 1.0, None),
        ("float32", 1e-5, 0.7, 3),
        ("float64", 1e-10, 0.7, None),
        ("float64", 1e-10, 0.0, 3),
    ],
)
def test_what_was_read_while_sampling_is_what_a_pass_over_the_responses_reads(
    tiny_model, mode, dtype, tolerance, temperature, batch_size
):
    backbone = _backbone(tiny_model, mode, dtype)
    head = backbone.head("policy")
    trajectory = _rollout(
        backbone,
        PROMPTS,
        range(8),
        temperature=temperature,
        batch_size=batch_size,
        with_logprobs=True,
        value_head=head,
    )
    with torch.no_grad():
        logprobs, entropies = backbone.token_logprobs(
            "policy", trajectory.sequences, temperature or 1.0, with_entropy=True
        )
        values = backbone.token_values("policy", trajectory.sequences)
    assert values.abs().max() > 0.1
    expected = {"logprobs": logprobs, "entropies": entropies, "values": values}
    for name, table in expected.items():
        read = getattr(trajectory, name)
        assert read.dtype == getattr(torch, dtype)
        torch.testing.assert_close(read, table, rtol=0, atol=tolerance, msg=name)
        assert (read[~trajectory.sequences.response_mask] == 0).all()


def test_nothing_is_kept_that_nobody_asked_for(exact):
    trajectory = _rollout(exact[0], PROMPTS, range(8))
    assert trajectory.logprobs is trajectory.entropies is trajectory.values is None


def test_responses_to_one_prompt_share_its_forward_and_the_longest_prompts_come_first(exact):
    """Split by the batch size, a prompt is read once in each batch."""
    backbone, _ = exact
    shapes = []
    with backbone.play("policy") as model:
        hook = model.get_decoder().register_forward_pre_hook(
            lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
    prompts = [[1, 50]] * 4 + [[1, 60, 61, 62]] * 4
    _rollout(backbone, prompts, range(8), max_new_tokens=1)
    _rollout(backbone, prompts, range(8), max_new_tokens=1, batch_size=3)
    hook.remove()
    assert shapes == [(2, 4), (1, 4), (2, 4), (1, 2)]


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "adapters"},
        {"mode": "adapters", "gradient_checkpointing": True},
        {"mode": "full"},
        {"mode": "adapters", "quantization": "nf4"},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_flow_after_a_rollout(tiny_model, changes, autocast):
    """On some CPUs one inference forward repacks NF4 weights into a layout without gradients."""
    backbone = _backbone(tiny_model, dtype="float32", **changes)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):  # as Lightning has it
        trajectory = _rollout(backbone, PROMPTS, range(8), max_new_tokens=4, with_logprobs=True)
        assert trajectory.logprobs.dtype == torch.float32 and (trajectory.logprobs <= 0).all()
        logprobs, _ = backbone.token_logprobs("policy", trajectory.sequences)
        values = backbone.token_values("policy", trajectory.sequences)
        with backbone.play("policy"):
            (logprobs.sum() + values.sum()).backward()
    missing = [p for p in backbone.trained_parameters("policy") if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing


def test_rows_carry_what_was_read_and_by_whom():
    mask = torch.ones(2, 1, dtype=torch.int64)
    tables = [torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]) * factor for factor in (1, 10, 100)]
    both = Trajectory.from_tokens(torch.tensor([[9, 5, 6], [9, 3, 2]]), mask, (2, 3), "policy", *tables)
    assert both.logprobs.tolist() == [[-1, -2], [-3, 0]] and both.values.tolist() == [[-100, -200], [-300, 0]]
    second = both.rows(slice(1, 2))
    assert second.entropies.tolist() == [[-30, 0]] and second.role == "policy"
    silent = Trajectory.from_tokens(torch.tensor([[9, 2]]), mask[:1], (2,))
    assert silent.rows(slice(0, 1)).values is None


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
