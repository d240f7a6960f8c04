import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from rto_lightning.memory.live_bytes import LiveBytes, tensor_bytes
from rto_lightning.memory.shapes import quantized_weight

SIZES = st.lists(st.integers(1, 1000), min_size=1, max_size=8)


@given(sizes=SIZES, fake=st.booleans())
def test_counts_what_is_alive_and_remembers_the_peak(sizes, fake):
    with FakeTensorMode() if fake else torch.no_grad(), LiveBytes() as live:
        kept = [torch.empty(size, dtype=torch.int16) for size in sizes]
        assert live.now == live.peak == 2 * sum(sizes)
        del kept[1:]
        assert live.now == 2 * sizes[0]
    assert live.peak == 2 * sum(sizes)


def test_views_and_changes_in_place_allocate_nothing():
    with LiveBytes() as live:
        table = torch.zeros(10, 10)
        views = table[2:], table.t(), table.view(-1).add_(1)
        assert live.now == 400
        del table
        assert live.now == 400  # a view keeps the storage
        del views
    assert live.now == 0


def test_known_tensors_do_not_count():
    weight = torch.zeros(10)
    with LiveBytes([weight]) as live:
        view, copy = weight[:5], weight.clone()
        assert live.now == copy.numel() * 4 and view.numel() == 5


def test_counts_what_the_backward_pass_holds():
    weight = torch.ones(100, 100, requires_grad=True)
    weight.grad = torch.zeros_like(weight)
    with LiveBytes([weight, weight.grad]) as live:
        loss = (weight.exp().exp()).sum()
        # Each exp keeps its result.
        assert live.now == 2 * weight.numel() * 4 + 4
        loss.backward()
        del loss
        gc.collect()
    assert live.now == 0 and live.peak >= 3 * weight.numel() * 4


def test_tensor_bytes_counts_each_storage_once():
    table = torch.zeros(8, 8)
    assert tensor_bytes([table, table[1:], table.t(), torch.zeros(4)]) == 64 * 4 + 16


@pytest.mark.parametrize("fake", [False, True])
def test_a_4_bit_product_is_seen_to_make_the_whole_weight(fake):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(256, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.no_grad(), LiveBytes() as live:
        if fake:
            layer.weight = quantized_weight(layer, torch.float32)  # the plan's, without storage
        layer(torch.ones(2, 256))
    assert live.peak >= 256 * 128 * 4
