"""The forwards, backwards, optimizer steps and rollouts of a stage on tensors without storage, and the bytes they take.

Since the code of the project and of the libraries runs, nothing has to be known of an architecture. All that is assumed
is that every prompt and response is as long as the settings allow.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import masking_utils

from rto_lightning.backbone.decoding import evaluating
from rto_lightning.backbone.divergence import gather_divergence
from rto_lightning.backbone.kv_cache import build_cache, cache_argument
from rto_lightning.backbone.logprobs import gather_logprobs
from rto_lightning.memory.live_bytes import LiveBytes, tensor_bytes
from rto_lightning.memory.shapes import BASE, StageShapes
from rto_lightning.memory.sharding import (
    cast_sharded_models,
    gathered_at_a_time,
    gathered_bytes,
    gathers_in_16_bits,
    gradients_at_a_time,
    held_of_base,
    held_of_copied_base,
    held_of_role,
    model_groups,
)
from rto_lightning.memory.workload import Forward, RoleWeights, Rollout, Workload
from rto_lightning.optimizers import build_optimizer
from rto_lightning.rollout.sampling import SAMPLED_LOGITS, draw_tokens

Kind = Literal[
    "weights",
    "copied base",
    "gradients",
    "optimizer",
    "optimizer step",
    "host",
    "summed gradients",
    "largest summed gradient",
    "activations",
    "gathered weights",
    "gathered gradients",
    "KV cache",
    "prefill",
    "decoding",
]


class Quantity(NamedTuple):
    """What some bytes are for."""

    kind: Kind
    """What they hold; `host` is all that a role keeps in the memory of the host, and summed gradients are those of
    which every process gets the sum."""
    role: str
    """The role, the source of an outside model, or `base`."""
    part: Forward | Rollout | None = None
    """What is computed, for activations and the key-value cache."""


def dry_run(workload: Workload, depth: int | None, foreach: bool) -> dict[Quantity, int]:
    """Bytes of everything a process of a stage holds and computes, if its models have at most `depth` layers.

    Args:
        workload: the stage.
        depth: layers; None leaves them all.
        foreach: whether torch's optimizers step all weights at once, as they do on a GPU.

    Raises:
        UserError: if the configuration of a model cannot be read.
    """
    shapes = StageShapes(workload, depth)
    base = held_of_base(shapes)
    sizes = {Quantity("weights", BASE): base.device, Quantity("host", BASE): base.host}
    for outside in workload.outside:
        sizes[Quantity("weights", outside.source)] = tensor_bytes(shapes.models[outside.source].parameters())
    for role in workload.roles:
        parameters = shapes.parameters(role.name)
        whole, held = tensor_bytes(parameters), held_of_role(shapes, role.name)
        sizes[Quantity("weights", role.name)] = held.device
        sizes[Quantity("host", role.name)] = held.host
        if role.optimizer is not None:
            state, step = _optimizer_bytes(role, shapes, parameters, foreach)
            sizes[Quantity("gradients", role.name)] = held.device
            sizes[Quantity("optimizer", role.name)] = state * held.device // whole
            sizes[Quantity("optimizer step", role.name)] = step * held.device // whole
            sizes[Quantity("host", role.name)] += held.host + state * held.host // whole
            summed = [] if shapes.parallelism.sharded and role.kind == "model" else parameters
            sizes[Quantity("summed gradients", role.name)] = tensor_bytes(summed)
            sizes[Quantity("largest summed gradient", role.name)] = max((w.nbytes for w in summed), default=0)
    if any(phase.copies_base for phase in workload.phases):
        sizes[Quantity("copied base", BASE)] = held_of_copied_base(shapes)
    if workload.parallelism.sharded:
        sizes |= _gathered_bytes(shapes, workload)
        if gathers_in_16_bits(workload):
            cast_sharded_models(shapes)
    seen: dict[Any, int] = {}
    for phase in workload.phases:
        for part in phase.parts:
            if isinstance(part, Rollout):
                for kind, size in _rollout_bytes(shapes, part, workload).items():
                    sizes[Quantity(kind, part.role, part)] = size
                continue
            alike = (_weights_of(shapes, part.role), part.reading, part.rows, part.backward)
            if alike not in seen:
                seen[alike] = _forward_bytes(shapes, part, workload)
            sizes[Quantity("activations", part.role, part)] = seen[alike]
    return sizes


def _gathered_bytes(shapes: StageShapes, workload: Workload) -> dict[Quantity, int]:
    """What each part has gathered of sharded models, at the time it has the most."""
    sizes: dict[Quantity, int] = {}
    in_16_bits = gathers_in_16_bits(workload)
    for part in (part for phase in workload.phases for part in phase.parts):
        if part.role in shapes.outside:
            continue
        groups = model_groups(shapes, part.role)
        size = gathered_at_a_time(groups, in_16_bits)
        if isinstance(part, Rollout):
            if workload.parallelism.gathers_for_rollout:
                size = gathered_bytes(groups.weights, in_16_bits)
        elif part.reading == "divergence" and shapes.model("reference") is not shapes.model(part.role):
            size += gathered_bytes(model_groups(shapes, "reference").root, in_16_bits)
        sizes[Quantity("gathered weights", part.role, part)] = size
        if isinstance(part, Forward) and part.backward and any(weight.requires_grad for weight in groups.weights):
            sizes[Quantity("gathered gradients", part.role, part)] = gradients_at_a_time(groups, in_16_bits)
    return sizes


def _weights_of(shapes: StageShapes, role: str) -> Any:
    """Equal for roles whose forwards take the same memory."""
    weights = shapes.roles.get(role)
    if weights is None or weights.kind == "model":
        return role
    return weights.kind, repr(weights.lora), weights.trained


def _forward_bytes(shapes: StageShapes, part: Forward, workload: Workload) -> int:
    """The most that is alive at a time beside weights and gradients."""
    with shapes.fake:
        ids = torch.empty(part.rows, workload.tokens, dtype=torch.int64)
        live = LiveBytes(shapes.weights())
        with live, shapes.play(part.role) as model:
            with _autocast(workload), torch.set_grad_enabled(part.backward):
                loss: Any = _read(shapes, part, model, ids, workload)
            if part.backward:
                torch.autograd.backward([loss])
    return live.peak


def _autocast(workload: Workload) -> Any:
    if workload.precision != "bf16-mixed":
        return nullcontext()
    return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)  # as Lightning does


def _read(shapes: StageShapes, part: Forward, model: Any, ids: Tensor, workload: Workload) -> Tensor:
    """What the backbone computes of sequences without padding; a number to run the backward of."""
    if part.role not in shapes.roles:
        logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return logits.sum()
    hidden = _hidden(model, ids)
    if part.reading == "score":
        return _head(shapes, part.role)(hidden[:, -1]).sum()
    hidden = _before_response(hidden, workload.response_tokens)
    tokens = ids[:, -workload.response_tokens :].flatten()
    chunk = workload.backbone.logprob_chunk_tokens
    if part.reading == "values":
        return _head(shapes, part.role)(hidden).sum()
    if part.reading == "divergence":
        with torch.no_grad(), shapes.play("reference") as reference:
            reference_hidden = _before_response(_hidden(reference, ids), workload.response_tokens)
        layers = model.get_output_embeddings(), reference.get_output_embeddings()
        compared = gather_divergence(hidden, reference_hidden, *layers, tokens, chunk)
        return (compared.logprobs + compared.kl).sum()
    with_entropy = part.reading == "logprobs and entropy"
    logprobs, entropy = gather_logprobs(hidden, model.get_output_embeddings(), tokens, 1.0, chunk, with_entropy)
    total = logprobs.sum() if entropy is None else (logprobs + entropy).sum()
    return total + _head(shapes, "critic")(hidden).sum() if part.reading == "logprobs and values" else total


def _hidden(model: Any, ids: Tensor) -> Tensor:
    with _without_packing():
        hidden: Tensor = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


@contextmanager
def _without_packing() -> Iterator[None]:
    """Within it, transformers takes each row for one sequence, as it is.

    It finds out from the values of the positions; where those have none, it makes an attention mask to be safe.
    """
    name = "find_packed_sequence_indices"
    found = getattr(masking_utils, name, None)
    if found is not None:
        setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        if found is not None:
            setattr(masking_utils, name, found)


def _before_response(hidden: Tensor, response_tokens: int) -> Tensor:
    """Hidden states (N, H) that the response tokens of all rows are predicted from."""
    rows, tokens, _ = hidden.shape
    positions = torch.arange(tokens - response_tokens - 1, tokens - 1).repeat(rows)
    return hidden.flatten(0, 1).index_select(0, positions)


def _head(shapes: StageShapes, role: str) -> Callable[[Tensor], Tensor]:
    return shapes.heads[role]


def _rollout_bytes(shapes: StageShapes, part: Rollout, workload: Workload) -> dict[Kind, int]:
    """The full key-value cache; the most that is alive, with part of it, until first tokens are drawn; beside it later.

    The sizes are those of :func:`~rto_lightning.backbone.decoding.decode`, if no response ends early.
    """
    tokens = workload.prompt_tokens + part.new_tokens - 1  # the last token of a response is never read
    prompts = part.rows if part.prompts is None else part.prompts
    play = shapes.play(part.role)
    with shapes.fake, torch.no_grad(), play as model, evaluating(model), _autocast(workload):
        ids = torch.empty(prompts, workload.prompt_tokens, dtype=torch.int64)
        mask = torch.ones_like(ids)
        cache: Any = build_cache(model.config, tokens)
        decoder, output_layer = model.get_decoder(), model.get_output_embeddings()
        with LiveBytes(shapes.weights()) as first:
            read = {"attention_mask": mask, "position_ids": mask.cumsum(-1) - 1}
            read[str(cache_argument(decoder, cache))] = cache
            hidden = decoder(input_ids=ids, use_cache=True, **read).last_hidden_state[:, -1].contiguous()
            logits = output_layer(hidden)
            if prompts < part.rows:
                logits = logits[torch.empty(part.rows, dtype=torch.int64)]
            _draw(logits, part.with_logprobs)
        layers = [_cache_layer_bytes(layer, workload.prompt_tokens, tokens) for layer in cache.layers]
        layers = [size * part.rows // prompts for size in layers]
        growth = max(layers, default=0)  # a layer is copied into more room, one at a time
        with LiveBytes(shapes.weights()) as later:
            hidden = torch.empty(part.rows, hidden.shape[1], dtype=hidden.dtype)
            logits = output_layer(hidden)
            held = later.now
            if part.new_tokens > 1:
                logits = output_layer(hidden)  # while those of the step before are still there
            _draw(logits, part.with_logprobs)
    return {"KV cache": sum(layers), "prefill": first.peak, "decoding": max(later.peak, held + growth)}


def _draw(logits: Tensor, with_logprobs: bool) -> None:
    part = logits[: max(1, SAMPLED_LOGITS // logits.shape[1])]
    draw_tokens(part, torch.empty(len(part), dtype=torch.float64), 0.5, with_logprobs)


def _cache_layer_bytes(layer: Any, prompt_tokens: int, tokens: int) -> int:
    """Bytes of one layer's keys and values when it has read `tokens`; a window does not grow with them."""
    held = layer.keys.shape[-2]
    states = (layer.keys, layer.values)
    size = sum(state.numel() * state.element_size() for state in states)
    return int(size * tokens / held) if held == prompt_tokens else int(size)


def _optimizer_bytes(
    role: RoleWeights, shapes: StageShapes, parameters: list[nn.Parameter], foreach: bool
) -> tuple[int, int]:
    """State of an optimizer after its first step, and what a step takes for itself."""
    assert role.optimizer is not None
    optimizer = build_optimizer(role.optimizer, parameters)
    # State is made first; a kernel that then reads a value has none to read.
    with shapes.fake, suppress(Exception), warnings.catch_warnings(action="ignore"):
        for weight in parameters:
            weight.grad = torch.empty_like(weight)
        optimizer.step()
    state = tensor_bytes(value for held in optimizer.state.values() for value in _tensors(held))
    reached = sum(weight.numel() for weight in optimizer.state)
    missing = sum(weight.numel() for weight in parameters) - reached
    if missing > 0 and reached > 0:
        state += missing * state // reached
    at_once = any(group.get("foreach", False) is None and not group.get("fused") for group in optimizer.param_groups)
    return state, tensor_bytes(parameters) if foreach and at_once else 0


def _tensors(state: Any) -> Iterator[Tensor]:
    return (value for value in state.values() if isinstance(value, Tensor))
