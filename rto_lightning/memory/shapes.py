"""The models and adapters of a stage as shapes: built from configurations alone, with tensors that have no storage.

They are built on the `meta` device and become fake tensors, on which every operation of torch gives the shapes, data
types and lifetimes of its results without computing them.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig
from transformers.quantizers import AutoHfQuantizer

from rto_lightning.backbone import BackboneSettings
from rto_lightning.backbone.adapters import AdapterBank
from rto_lightning.backbone.heads import ScalarHead
from rto_lightning.backbone.loading import switch_dropout_off
from rto_lightning.backbone.model_files import check_source
from rto_lightning.errors import UserError, first_line
from rto_lightning.memory.live_bytes import tensor_bytes
from rto_lightning.memory.workload import RoleWeights, Workload

BASE = "base"
NF4_BLOCK, NF4_SCALE_BLOCK = 64, 256
"""Weights for each 8-bit scale, and scales for each float32 one, of NF4 with double quantization."""

_ALIKE: dict[tuple[bool, str], bool] = {}
"""What was found out of each configuration; it takes as long as the plan itself."""


class StageShapes:
    """Every model, adapter and head of a stage, of at most `depth` layers each.

    Args:
        workload: the stage.
        depth: layers that each model has at most; None leaves them all.

    Raises:
        UserError: if a configuration cannot be read.
    """

    def __init__(self, workload: Workload, depth: int | None) -> None:
        self.settings = settings = workload.backbone
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)  # optimizers bring real tables
        self.models: dict[str, Any] = {}
        self.heads: dict[str, ScalarHead] = {}
        self.roles = {role.name: role for role in workload.roles}
        self.outside = {outside.source for outside in workload.outside}
        self.parallelism = workload.parallelism
        self._depth = depth
        with torch.device("meta"):
            if workload.holds_base:
                self.models[BASE] = self._model(None, settings.frozen_dtype, settings.quantization is not None)
                self.bank = AdapterBank(self.models[BASE], settings.trained_dtype)
            for role in workload.roles:
                self._add(role)
            for outside in workload.outside:
                self.models[outside.source] = self._classifier(outside.source)
        with self.fake:
            for module in (*self.models.values(), *self.heads.values()):
                _allocate(module, settings.frozen_dtype)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The weights of a role's own: adapter or model, and head."""
        role = self.roles[name]
        own: list[nn.Parameter] = []
        if role.kind == "adapter":
            own = self.bank.parameters(name)
        elif role.kind == "model":
            own = list(self.models[name].parameters())
        head = list(self.heads[name].parameters()) if name in self.heads else []
        return [*own, *head]

    def base_bytes(self) -> int:
        """Bytes of the base model without adapters; 0 if it is not held."""
        if BASE not in self.models:
            return 0
        adapters = {id(weight) for name in self.bank.names for weight in self.bank.parameters(name)}
        return tensor_bytes(tensor for tensor in model_tensors(self.models[BASE]) if id(tensor) not in adapters)

    def weights(self) -> Iterator[Tensor]:
        """Every weight and buffer, and every gradient that is there."""
        for module in (*self.models.values(), *self.heads.values()):
            for tensor in model_tensors(module):
                yield tensor
                if tensor.requires_grad and tensor.grad is not None:
                    yield tensor.grad

    def model(self, role: str) -> Any:
        """The model that plays a role, or an outside model."""
        if role in self.models:
            return self.models[role]
        return self.model("policy") if self.roles[role].kind == "shared" else self.models[BASE]

    @contextmanager
    def play(self, role: str) -> Iterator[Any]:
        """Within it, the model computes as this role."""
        while role in self.roles and self.roles[role].kind == "shared":
            role = "policy"
        model = self.model(role)
        if model is not self.models.get(BASE):
            yield model
            return
        with self.bank.active(role if self.roles[role].kind == "adapter" else None):
            yield model

    def _add(self, role: RoleWeights) -> None:
        settings = self.settings
        if role.kind == "adapter":
            assert role.lora is not None
            self.bank.add(role.name, role.lora, role.trained)
        elif role.kind == "model":
            dtype = settings.trained_dtype if role.master else settings.frozen_dtype
            self.models[role.name] = self._model(role.source, dtype).requires_grad_(role.trained)
        if role.head:
            width = self.model(role.name).config.get_text_config().hidden_size
            self.heads[role.name] = ScalarHead(width, settings.trained_dtype).requires_grad_(role.trained)

    def _model(self, source: str | None, dtype: torch.dtype, quantized: bool = False) -> Any:
        config = shortened(read_config(source or self.settings.model, self.settings), self._depth)
        switch_dropout_off(config)
        # Flash attention keeps for the backward pass what sdpa keeps, and need not be installed to be planned.
        attention = "eager" if self.settings.attention == "eager" else "sdpa"
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=self.settings.trust_remote_code,
        )
        if quantized:
            _replace_linear_layers(model, dtype)
        model.requires_grad_(False)
        model.train()
        if self.settings.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def _classifier(self, source: str) -> Any:
        config = shortened(read_config(source), self._depth)
        config.num_labels = 1
        if config.pad_token_id is None:
            config.pad_token_id = 0
        dtype = self.settings.frozen_dtype
        # False, since None asks on the terminal.
        model = AutoModelForSequenceClassification.from_config(config, dtype=dtype, trust_remote_code=False)
        return model.requires_grad_(False).eval()


def read_config(source: str, settings: BackboneSettings | None = None) -> Any:
    """The configuration of a model.

    Args:
        source: folder or hub name.
        settings: of the base model, whose revision and trust hold for it; None for an outside model,
            whose own code is never run.

    Raises:
        UserError: if there is none, or it needs code that is not trusted.
    """
    options: dict[str, Any] = {"trust_remote_code": settings is not None and settings.trust_remote_code}
    if settings is not None and source == settings.model and settings.revision is not None:
        options["revision"] = settings.revision
    check_source(source, options.get("revision"))
    try:
        return AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the memory plan needs the config.json of {source} ({first_line(error)}); name a local folder that has it."
        ) from error


def layers_of(config: Any) -> int:
    """Layers of a model."""
    return int(config.get_text_config().num_hidden_layers)


def shortened(config: Any, depth: int | None) -> Any:
    """A copy of a configuration with at most `depth` layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if depth is not None and text.num_hidden_layers > depth:
        text.num_hidden_layers = depth
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:depth]
    return config


def layers_are_alike(config: Any, settings: BackboneSettings | None = None) -> bool:
    """Whether memory grows by the same amount with each layer, as far as a configuration and parameter counts tell.

    Args:
        config: of a model.
        settings: of the base model, as for :func:`read_config`; None for an outside model, a sequence classifier.
    """
    if len(set(getattr(config.get_text_config(), "layer_types", None) or ())) > 1:
        return False
    key = settings is None, config.to_json_string()
    if key not in _ALIKE:
        two, three, full = (_count_weights(config, depth, settings) for depth in (2, 3, None))
        _ALIKE[key] = full == two + (layers_of(config) - 2) * (three - two)
    return _ALIKE[key]


def _count_weights(config: Any, depth: int | None, settings: BackboneSettings | None) -> int:
    config = shortened(config, depth)
    with torch.device("meta"):
        if settings is None:
            model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
        else:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=settings.trust_remote_code)
    return sum(weight.numel() for weight in model.parameters())


def model_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of a model, and the scales of quantized ones."""
    yield from module.buffers()
    for weight in module.parameters():
        yield weight
        yield from state_tensors(getattr(weight, "quant_state", None))


def state_tensors(state: Any) -> Iterator[Tensor]:
    """The tensors of bitsandbytes' state of a quantized weight."""
    if state is None:
        return
    for value in (state.absmax, state.code, state.offset):
        if isinstance(value, Tensor):
            yield value
    yield from state_tensors(state.state2)


def _replace_linear_layers(model: Any, dtype: torch.dtype) -> None:
    """As transformers does before it loads weights as NF4; see `load_causal_lm`."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map=None)
    quantizer.postprocess_model(model)


def _allocate(module: nn.Module, compute_dtype: torch.dtype) -> None:
    """Put tensors of the active fake mode in the place of a module's meta tensors; shared ones stay shared."""
    made: dict[int, Any] = {}
    child: Any
    for child in module.modules():
        for name, weight in _named(child._parameters):
            if id(weight) not in made:
                quantized = name == "weight" and type(child).__name__ == "Linear4bit"
                made[id(weight)] = quantized_weight(child, compute_dtype) if quantized else _empty_like(weight)
            child._parameters[name] = made[id(weight)]
        for name, buffer in _named(child._buffers):
            child._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _named(tensors: Any) -> Iterable[tuple[str, Any]]:
    return [(name, tensor) for name, tensor in tensors.items() if tensor is not None]


def _empty_like(weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), requires_grad=weight.requires_grad)


def quantized_weight(layer: Any, dtype: torch.dtype) -> nn.Parameter:
    """The weight of a bitsandbytes `Linear4bit` after NF4 quantization with double quantization, (⌈weights / 2⌉, 1).

    Args:
        layer: has `in_features` and `out_features`.
        dtype: in which its product is computed.
    """
    from bitsandbytes.functional import QuantState

    count = layer.in_features * layer.out_features
    scales = -(-count // NF4_BLOCK)
    state = QuantState(
        absmax=torch.empty(scales, dtype=torch.uint8),
        shape=torch.Size((layer.out_features, layer.in_features)),
        code=torch.empty(16),
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.empty(()),
        state2=QuantState(
            absmax=torch.empty(-(-scales // NF4_SCALE_BLOCK)),
            code=torch.empty(256),
            blocksize=NF4_SCALE_BLOCK,
            dtype=torch.float32,
        ),
    )
    weight = nn.Parameter(torch.empty((count + 1) // 2, 1, dtype=torch.uint8), requires_grad=False)
    weight.quant_state = state  # type: ignore[attr-defined]
    layer.support_avx512bf16_for_cpu = False
    return weight
