"""The short forward of LoRA layers against PEFT's own."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import nn

from rto_lightning.backbone.lora import LoraForward, simplify_forward
from tests.models import make_backbone, some_sequences


class Body(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.first = nn.Linear(6, 5, dtype=dtype)
        self.second = nn.Linear(5, 4, bias=False, dtype=dtype)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def _body(dtype=torch.float64, **options):
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["first", "second"], init_lora_weights=False, **options)
    model = get_peft_model(Body(dtype), config)
    layers = [module for module in model.modules() if isinstance(module, PeftLinear)]
    for layer in layers:
        for part in (layer.lora_A, layer.lora_B):
            part["default"].to(torch.float64 if dtype == torch.float64 else torch.float32)
    return model, layers


def _read(model, x):
    """Output and the gradients of input and adapters, of a loss that weighs all outputs differently."""
    x = x.clone().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), [x, *trained])]


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (2, 0, 6)])
def test_output_and_gradients_are_those_of_peft(shape):
    model, layers = _body()
    x = torch.randn(shape, dtype=torch.float64)
    expected = _read(model, x)
    for layer in layers:
        simplify_forward(layer)
        assert isinstance(layer.forward, LoraForward)
    for found, wanted in zip(_read(model, x), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_without_its_adapter_a_layer_is_the_base_layer():
    model, layers = _body()
    x = torch.randn(3, 6, dtype=torch.float64)
    with model.disable_adapter():
        expected = model(x)
    for layer in layers:
        simplify_forward(layer)
    assert not torch.allclose(model(x), expected)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)


def test_the_input_of_a_layer_is_left_as_it_was():
    _, layers = _body()
    simplify_forward(layers[0])
    x = torch.randn(3, 6, dtype=torch.float64)
    before = x.clone()
    layers[0](x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_bfloat16_product_keeps_float32_masters(autocast):
    model, layers = _body(torch.float32 if autocast else torch.bfloat16)
    x = torch.randn(4, 6, dtype=torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = _read(model, x)
        for layer in layers:
            simplify_forward(layer)
        found = _read(model, x)
    assert found[0].dtype == torch.bfloat16
    assert [tensor.dtype for tensor in found[2:]] == [torch.float32] * 4
    for tensor, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(tensor, wanted, rtol=0.05, atol=0.05 * float(wanted.abs().max()))


def test_variants_keep_pefts_forward():
    model, layers = _body(use_dora=True)
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = model(x)
    for layer in layers:
        simplify_forward(layer)
        assert not isinstance(layer.forward, LoraForward)
    assert torch.equal(model(x), expected)


def test_a_variant_that_is_added_later_brings_pefts_forward_back():
    model, layers = _body()
    simplify_forward(layers[0])
    model.add_adapter("dora", LoraConfig(r=2, target_modules=["first", "second"], use_dora=True))
    simplify_forward(layers[0])
    assert not isinstance(layers[0].forward, LoraForward)


def test_a_merged_layer_adds_its_adapter_once():
    model, layers = _body()
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = model(x)
    for layer in layers:
        simplify_forward(layer)
        layer.merge()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_fresh_adapter_on_4_bit_weights_changes_nothing(tiny_model, autocast):
    """Autocast rounds sums to 16 bits where the layer alone gives 32; then the KL would not start at 0."""
    backbone = make_backbone(tiny_model, quantization="nf4", dtype="float32")
    backbone.add_role("reference")
    backbone.add_role("policy", trainable=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        policy, _ = backbone.token_logprobs("policy", some_sequences())
        reference, _ = backbone.token_logprobs("reference", some_sequences())
    assert torch.equal(policy, reference)
