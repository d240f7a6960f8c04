"""4-bit weights where bitsandbytes is missing, too old, or has no kernels for the device; how long a context is."""

import sys
from typing import Any

import bitsandbytes
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, MambaConfig

from rto_lightning.backbone import loading
from rto_lightning.backbone.loading import check_quantization, context_length, load_causal_lm
from rto_lightning.errors import UserError
from tests.models import backbone_settings

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_4_bit_weights_work_on_a_cpu(dtype: torch.dtype) -> None:
    random = torch.get_rng_state()
    check_quantization(CPU, dtype)
    assert torch.equal(torch.get_rng_state(), random)


def refusal() -> str:
    with pytest.raises(UserError) as error:
        check_quantization(CPU, torch.float32)
    message = str(error.value)
    assert "\n" not in message and message.endswith(", or set model.backbone.quantization to null.")
    return message


def test_bitsandbytes_is_missing(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert refusal().startswith("quantization nf4 needs bitsandbytes, which cannot be imported (")


def test_bitsandbytes_is_too_old(monkeypatch) -> None:
    monkeypatch.setattr(loading, "version", lambda name: "0.9.0")  # as text it would be newer than 0.49
    assert refusal().startswith("quantization nf4 needs bitsandbytes 0.49 or newer and 0.9.0 is installed; run ")


@pytest.mark.parametrize("when", ["quantize", "forward", "backward", "decode"])
def test_the_device_has_no_kernels(monkeypatch, when: str) -> None:
    def no_kernel(*args: Any, **options: Any) -> Any:
        raise RuntimeError("no kernel image is available for execution on the device\nsecond line")

    layer = bitsandbytes.nn.Linear4bit
    if when == "quantize":
        monkeypatch.setattr(bitsandbytes.nn.Params4bit, "_quantize", no_kernel)
    elif when == "backward":
        monkeypatch.setattr(torch.Tensor, "backward", no_kernel)
    else:
        forward = layer.forward
        failing = torch.is_grad_enabled if when == "forward" else lambda: not torch.is_grad_enabled()
        monkeypatch.setattr(layer, "forward", lambda self, x: no_kernel() if failing() else forward(self, x))
    message = refusal()
    assert message.startswith(f"bitsandbytes {bitsandbytes.__version__} cannot compute with 4-bit weights on ")
    assert "(no kernel image is available for execution on the device)" in message
    assert "trainer.accelerator" in message


def test_it_is_found_out_before_a_model_is_loaded(monkeypatch, tmp_path) -> None:
    settings = backbone_settings(tmp_path / "no-model", dtype="float32", quantization="nf4")
    with pytest.raises(UserError, match="does not exist"):
        load_causal_lm(settings.model, settings, torch.float32, quantized=True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="needs bitsandbytes"):
        load_causal_lm(settings.model, settings, torch.float32, quantized=True)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("recurrent_gemma", {"logits_soft_cap": 30.0}),
        ("cohere", {"logit_scale": 0.06}),
        ("phimoe", {}),
    ],
)
def test_models_that_are_read_otherwise_are_refused(tmp_path, model_type, settings) -> None:
    """Log-probabilities are the output layer on the hidden states, the same in every forward."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(model_type, **sizes, num_key_value_heads=2, head_dim=8, vocab_size=32, **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="use another model family"):
        load_causal_lm(str(tmp_path), backbone_settings(tmp_path), torch.float32)


def test_noise_of_routers_is_off() -> None:
    config = AutoConfig.for_model("mixtral", router_jitter_noise=0.1)
    loading.switch_dropout_off(config)
    assert config.router_jitter_noise == 0.0


def test_a_context_may_have_another_name_or_no_limit() -> None:
    assert context_length(LlamaConfig(max_position_embeddings=512)) == 512
    assert context_length(GPT2Config(n_positions=128)) == 128
    assert context_length(MambaConfig()) == sys.maxsize
