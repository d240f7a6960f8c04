"""The decode loop against transformers' `generate`, for several architectures, and the work that it saves."""

from functools import partial

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3NextConfig,
)

from rto_lightning.backbone import Draw, decode
from rto_lightning.backbone.decoding import shared_prompts
from rto_lightning.backbone.sequences import pad_left
from rto_lightning.errors import UserError
from rto_lightning.rollout.sampling import SeededSampling
from tests.rollout.oracles import generated_responses

VOCABULARY = 80
STOPS = tuple(range(2, 40, 3))
PROMPTS = [[5, 6, 7, 8, 9], [5, 6, 7, 8, 9], [11, 12, 13], [11, 12, 13], [11, 12, 13], [20], [21, 22, 23, 24]]
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=64,
    initializer_range=0.4,
    pad_token_id=2,
    eos_token_id=2,
    bos_token_id=1,
)
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "gemma": GemmaConfig(**SIZES),
    "sliding window": MistralConfig(**SIZES, sliding_window=4),
    "linear attention": Qwen3NextConfig(
        **SIZES,
        layer_types=["linear_attention", "full_attention"],
        num_experts=0,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=4,
        linear_value_head_dim=4,
    ),
}


def _model(name, attention="sdpa", dtype=torch.float64):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention, dtype=dtype)
    return model.eval()


def _decode(model, prompts, draw, max_new_tokens, **options):
    ids, mask = pad_left(prompts, 2)
    return decode(model, ids, mask.long(), draw, STOPS, 2, max_new_tokens, **options)


def _responses(decoded):
    """Each response up to its stop id, after which nothing but padding may stand."""
    rows = []
    for row in decoded.tokens.tolist():
        length = next((i + 1 for i, token in enumerate(row) if token in STOPS), len(row))
        assert set(row[length:]) <= {2}
        rows.append(row[:length])
    return rows


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", CONFIGS)
def test_responses_are_those_of_generate(name, temperature):
    model = _model(name)
    seeds = list(range(len(PROMPTS)))
    expected = generated_responses(model, PROMPTS, seeds, STOPS, 24, temperature)
    if temperature > 0:
        assert len({len(response) for response in expected}) > 2  # rows end at different times
    decoded = _decode(model, PROMPTS, SeededSampling(seeds, 24, temperature), 24)
    assert _responses(decoded) == expected
    assert decoded.tokens.shape[1] == max(map(len, expected))


def test_eager_attention_gives_the_same_responses():
    """In float32: transformers' eager softmax is float32, and its float64 mask gives nan in padding."""
    seeds = list(range(len(PROMPTS)))
    models = [_model("llama", attention, torch.float32) for attention in ("sdpa", "eager")]
    sdpa, eager = (_decode(model, PROMPTS, SeededSampling(seeds, 24, 0.8), 24) for model in models)
    assert _responses(sdpa) == _responses(eager)


def _script(lengths, logits, rows, step):
    """Row i stops at its own length."""
    ends = torch.tensor(lengths)[rows] == step + 1
    return Draw(torch.where(ends, 2, 40 + rows))


class _Calls:
    """What the decoder body and the output layer were called with."""

    def __init__(self, model):
        self.ids, self.masks, self.logits = [], [], []
        model.get_decoder().register_forward_pre_hook(self._body, with_kwargs=True)
        model.get_output_embeddings().register_forward_hook(lambda *call: self.logits.append(tuple(call[-1].shape)))

    def _body(self, module, args, kwargs):
        self.ids.append(kwargs["input_ids"])
        self.masks.append(kwargs["attention_mask"])

    @property
    def shapes(self):
        return [tuple(ids.shape) for ids in self.ids]


def test_equal_neighbours_share_a_prefill_and_ended_rows_leave():
    model = _model("llama")
    calls = _Calls(model)
    lengths = [1, 3, 6, 6, 2, 4, 3]
    decoded = _decode(model, PROMPTS, partial(_script, lengths), 24)
    assert [len(row) for row in _responses(decoded)] == lengths
    # Four different prompts; then the tokens of the rows that have not ended. The last token is read by nobody.
    assert calls.shapes == [(4, 5), (6, 1), (5, 1), (3, 1), (2, 1), (2, 1)]
    assert calls.logits == [(rows, VOCABULARY) for rows, _ in calls.shapes]
    assert calls.ids[2].squeeze(1).tolist() == [41, 42, 43, 45, 46]


def test_a_single_row_does_not_make_a_large_batch_move():
    """The cache is copied when an eighth of the rows has ended; until then they are fed padding."""
    model = _model("llama")
    calls = _Calls(model)
    prompts = [[3 + i] for i in range(32)]
    decoded = _decode(model, prompts, partial(_script, [9] * 26 + [2, 3, 4, 5, 6, 7]), 9)
    assert [len(row) for row in _responses(decoded)] == [9] * 26 + [2, 3, 4, 5, 6, 7]
    assert [rows for rows, _ in calls.shapes] == [32, 32, 32, 32, 32, 28, 28, 28, 28]
    assert calls.ids[3].squeeze(1).tolist()[26:] == [2, 2, 68, 69, 70, 71]


def test_all_rows_may_end_at_the_first_token():
    model = _model("llama")
    calls = _Calls(model)
    assert _responses(_decode(model, PROMPTS, partial(_script, [1] * 7), 24)) == [[2]] * 7
    assert calls.shapes == [(4, 5)]


def test_there_is_a_mask_only_while_there_is_padding():
    model = _model("llama")
    calls = _Calls(model)
    _decode(model, PROMPTS, partial(_script, [4, 4, 2, 2, 2, 2, 2]), 24)
    assert [None if mask is None else tuple(mask.shape) for mask in calls.masks] == [(4, 5), (7, 6), None, None]
    calls.masks.clear()
    _decode(model, [[5, 6, 7]] * 3 + [[8, 9, 10]], partial(_script, [3] * 4), 24)
    assert calls.masks == [None] * 3


def test_values_are_read_before_each_token():
    model = _model("llama")
    decoded = _decode(model, PROMPTS, SeededSampling([7] * 7, 10, 1.0), 10, value_head=lambda h: h[:, 0])
    for prompt, response, values in zip(PROMPTS, _responses(decoded), decoded.values, strict=True):
        with torch.no_grad():
            hidden = model.get_decoder()(torch.tensor([prompt + response])).last_hidden_state[0, :, 0]
        expected = hidden[len(prompt) - 1 : -1]
        torch.testing.assert_close(values[: len(response)], expected, rtol=0, atol=1e-12)
        assert (values[len(response) :] == 0).all()
    assert decoded.logprobs is None and decoded.entropies is None


def test_a_model_without_a_cache_is_refused():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1))
    with pytest.raises(UserError, match="mamba models take no key-value cache"):
        _decode(model.eval(), PROMPTS, SeededSampling([0] * 7, 4, 1.0), 4)


def test_shared_prompts_are_neighbours_with_equal_tokens_and_padding():
    ids = torch.tensor([[2, 5, 6], [2, 5, 6], [2, 5, 6], [7, 5, 6], [2, 5, 6]])
    mask = torch.tensor([[0, 1, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1], [0, 1, 1]])
    first, group = shared_prompts(ids, mask)
    assert first.tolist() == [0, 2, 3, 4]
    assert group.tolist() == [0, 0, 1, 2, 3]
