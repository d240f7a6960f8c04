"""oneDNN's linear layers compute what PyTorch's do, and step aside where they cannot."""

import copy

import pytest
import torch
from torch import nn

from rto_lightning.backbone import cpu_linear
from rto_lightning.backbone.cpu_linear import OneDnnForward, use_onednn
from tests.models import make_backbone, randomize, some_sequences

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this PyTorch has no oneDNN",
)


@pytest.fixture
def products(monkeypatch):
    """Shapes of the weights that oneDNN multiplied."""
    shapes, product = [], cpu_linear._product
    monkeypatch.setattr(cpu_linear, "_product", lambda x, w, b: shapes.append(tuple(w.shape)) or product(x, w, b))
    monkeypatch.setattr(cpu_linear, "SMALLEST_WEIGHT", 1)
    return shapes


def _layer(bias=True, frozen=True, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(24, 40, bias=bias, dtype=dtype).requires_grad_(not frozen)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 5, 24)])
def test_results_and_gradients_are_those_of_pytorch(products, bias, shape):
    plain, fast = _layer(bias), _layer(bias)
    assert use_onednn(fast) == 1
    x = torch.randn(shape)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = [plain(inputs[0]), fast(inputs[1])]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-6)
    weights = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weights).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=0, atol=1e-6)
    assert products == [(40, 24), (24, 40)]


def test_inputs_need_not_be_contiguous(products):
    layer, x = _layer(), torch.randn(24, 6).t()
    use_onednn(layer)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=0, atol=1e-6)
    assert len(products) == 1


def test_trained_weights_keep_their_gradients(products):
    layer = _layer(frozen=False)
    use_onednn(layer)
    layer(torch.randn(3, 24)).sum().backward()
    assert layer.weight.grad is not None and not products
    with torch.no_grad():
        layer(torch.randn(3, 24))
    assert len(products) == 1


def test_other_types_and_autocast_are_left_to_pytorch(products):
    layer = _layer()
    use_onednn(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 24)).dtype == torch.bfloat16
    layer.double()
    assert layer(torch.randn(3, 24, dtype=torch.float64)).dtype == torch.float64
    assert layer.float()(torch.randn(0, 24)).shape == (0, 40)
    assert not products
    assert use_onednn(_layer(dtype=torch.bfloat16)) == 0


def test_a_copied_layer_computes_with_its_own_weights(products):
    layer = _layer()
    use_onednn(layer)
    other = copy.deepcopy(layer)
    nn.init.zeros_(other.weight)
    nn.init.zeros_(other.bias)
    x = torch.randn(3, 24)
    assert (other(x) == 0).all() and (layer(x) != 0).any()


def test_small_layers_are_left_alone():
    assert use_onednn(_layer()) == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_on_a_float32_base_learn_the_same(tiny_model, products, checkpointing):
    backbone = make_backbone(tiny_model, dtype="float32", gradient_checkpointing=checkpointing)
    backbone.add_role("policy", trainable=True)
    trained = backbone.trained_parameters("policy")
    randomize(trained)
    gradients = []
    for fast in (False, True):
        if fast:
            assert use_onednn(backbone) == sum(isinstance(m.forward, OneDnnForward) for m in backbone.modules()) > 7
        logprobs, _ = backbone.token_logprobs("policy", some_sequences())
        with backbone.play("policy"):
            gradients.append(torch.autograd.grad(logprobs.sum(), trained))
    assert len(products) > 2 * 7
    for plain, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-5)
