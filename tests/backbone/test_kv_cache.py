"""The cache holds what transformers' holds, in less work, and never more room than it was given."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Cache, DynamicCache, GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3NextConfig
from transformers.cache_utils import DynamicLayer

from rto_lightning.backbone.kv_cache import BlockLayer, build_cache, select_rows

HEADS, WIDTH = 2, 3
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 9)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 99), min_size=1, max_size=6)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("crop"), st.integers(-3, -1)),
        st.tuples(st.just("reset"), st.none()),
    ),
    min_size=1,
    max_size=10,
)


def _states(rows, tokens, dtype=torch.float64):
    return torch.randn(rows, HEADS, tokens, WIDTH, dtype=dtype)


@given(operations=OPERATIONS, rows=st.integers(1, 3), block=st.integers(1, 8), limit=st.integers(1, 30))
def test_block_layer_holds_what_transformers_layer_holds(operations, rows, block, limit):
    ours, theirs = BlockLayer(limit, block), DynamicLayer()
    first_rows, longest = rows, 0
    for name, argument in [("append", 3), *operations]:
        if name == "append":
            states = _states(rows, argument), _states(rows, argument)
            shown = ours.update(*states)
            for mine, other in zip(shown, theirs.update(*states), strict=True):
                assert torch.equal(mine, other)
        elif name == "select" and theirs.get_seq_length():
            index = torch.tensor(argument) % rows
            ours.batch_select_indices(index)
            theirs.batch_select_indices(index)
            rows = len(argument)
        elif name == "repeat" and theirs.get_seq_length():
            ours.batch_repeat_interleave(argument)
            theirs.batch_repeat_interleave(argument)
            rows *= argument
        elif name == "crop" and theirs.get_seq_length() > 3:
            ours.crop(argument)
            theirs.crop(argument)
        elif name == "reset":
            ours.reset()
            theirs.reset()
            rows, longest = first_rows, 0
        length = theirs.get_seq_length()
        assert ours.get_seq_length() == length
        assert ours.get_mask_sizes(2) == theirs.get_mask_sizes(2)
        if length:
            assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
        longest = max(longest, length)
        assert longest <= ours.room_tokens <= max(limit, longest)
        assert ours.room_tokens < longest + block or longest == 0


def test_room_grows_by_blocks_up_to_the_limit():
    layer = BlockLayer(max_tokens=20, block_tokens=8)
    rooms = []
    for _ in range(22):
        layer.update(_states(1, 1), _states(1, 1))
        rooms.append(layer.room_tokens)
    assert rooms == [8] * 8 + [16] * 8 + [20] * 4 + [21, 22]  # beyond the limit it holds what it is given


def test_a_token_is_written_in_place():
    layer = BlockLayer(max_tokens=64, block_tokens=8)
    keys, values = layer.update(_states(2, 3), _states(2, 3))
    places = keys.data_ptr(), values.data_ptr()
    for length in range(4, 9):
        keys, values = layer.update(_states(2, 1), _states(2, 1))
        assert keys.shape[2] == length and (keys.data_ptr(), values.data_ptr()) == places
    keys, _ = layer.update(_states(2, 1), _states(2, 1))
    assert keys.data_ptr() != places[0]


def test_rows_that_leave_give_their_memory_back():
    layer = BlockLayer(max_tokens=64, block_tokens=8)
    layer.update(_states(8, 3), _states(8, 3))
    full = layer.keys.untyped_storage().nbytes()
    layer.reorder_cache(torch.tensor([1, 5]))
    assert layer.keys.untyped_storage().nbytes() == full // 4


def test_keys_and_values_may_differ_in_type_and_width():
    layer = BlockLayer(max_tokens=16, block_tokens=8)
    keys, values = _states(2, 3, torch.float32), _states(2, 3, torch.bfloat16)[..., :2]
    shown = layer.update(keys, values)
    assert torch.equal(shown[0], keys) and torch.equal(shown[1], values)
    layer.reorder_cache(torch.tensor([1]))
    assert torch.equal(layer.keys, keys[1:]) and torch.equal(layer.values, values[1:])


SIZES = dict(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, num_key_value_heads=2)


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config, GemmaConfig])
def test_models_with_full_attention_get_blocks(kind):
    cache = build_cache(kind(**SIZES), 10)
    assert [type(layer) for layer in cache.layers] == [BlockLayer] * 2
    assert all(layer.max_tokens == 10 for layer in cache.layers)


@pytest.mark.parametrize("config", [MistralConfig(sliding_window=4, **SIZES), Qwen3NextConfig(**SIZES)])
def test_other_models_get_what_transformers_builds(config):
    expected = DynamicCache(config=config)
    assert [type(layer) for layer in build_cache(config, 10).layers] == [type(layer) for layer in expected.layers]


def test_rows_of_every_layer_are_selected():
    cache = Cache(layers=[BlockLayer(8), BlockLayer(8)])
    keys = [_states(3, 2), _states(3, 2)]
    for number, states in enumerate(keys):
        cache.update(states, states + 1, number)
    select_rows(cache, torch.tensor([2, 0, 2, 1]))
    for number, states in enumerate(keys):
        assert torch.equal(cache.layers[number].keys, states[[2, 0, 2, 1]])
        assert torch.equal(cache.layers[number].values, states[[2, 0, 2, 1]] + 1)
