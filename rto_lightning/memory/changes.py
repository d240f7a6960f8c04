"""What to change where memory is short, and what each change would leave."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rto_lightning.memory.parallelism import ONE_PROCESS, Parallelism
from rto_lightning.memory.plan import MemoryPlan, plan_memory
from rto_lightning.memory.stages import workload_of
from rto_lightning.modules import RTOModule, StageModule

_CHUNK_TOKENS = 256
_WORTHWHILE = 0.01
"""Changes that save a smaller share than this are not proposed."""


@dataclass(frozen=True)
class Change:
    """One setting, and the plan with it."""

    setting: str
    """As on the command line, such as `model.backbone.quantization nf4`."""
    peak: int
    """The sum in bytes."""


def proposed_changes(
    plan: MemoryPlan,
    module: StageModule,
    data: Any,
    precision: str,
    foreach: bool = False,
    parallelism: Parallelism = ONE_PROCESS,
) -> list[Change]:
    """Settings that would take less memory, each alone, the best first, and at last all together.

    Args:
        plan: the plan without them.
        module: the stage.
        data: its data module.
        precision: `trainer.precision`.
        foreach: as for :func:`plan_memory`.
        parallelism: as for :func:`workload_of`.
    """

    def peak_of(module: StageModule, data: Any, parallelism: Parallelism) -> int | None:
        try:
            return plan_memory(workload_of(module, data, precision, parallelism), plan.process, foreach).peak
        except Exception:  # a change that this model or installation does not allow is none
            return None

    changes = []
    all_parallelism = parallelism
    for setting, changed_parallelism in _candidates_of_parallelism(module, parallelism):
        peak = peak_of(module, data, changed_parallelism)
        if peak is not None and peak < (1 - _WORTHWHILE) * plan.peak:
            changes.append(Change(setting, peak))
            all_parallelism = changed_parallelism
    all_module, all_data = copy.copy(module), copy.copy(data)
    for setting, changed, name, value in _candidates(module, data, parallelism):
        one_module, one_data = copy.copy(module), copy.copy(data)
        setattr(one_module if changed is module else one_data, name, value)
        peak = peak_of(one_module, one_data, parallelism)
        if peak is not None and peak < (1 - _WORTHWHILE) * plan.peak:
            changes.append(Change(setting, peak))
            target = all_module if changed is module else all_data
            # Two settings may live in one dataclass, of which each candidate has changed one field only.
            setattr(target, name, _merged(getattr(target, name), getattr(changed, name), value))
    changes.sort(key=lambda change: change.peak)
    if len(changes) > 1:
        peak = peak_of(all_module, all_data, all_parallelism)
        if peak is not None:
            changes.append(Change("all of these", peak))
    return changes


def _candidates_of_parallelism(module: StageModule, parallelism: Parallelism) -> Iterator[tuple[str, Parallelism]]:
    """(what a user types, how the stage is then spread)"""
    if parallelism.processes > 1 and not parallelism.sharded:
        yield "trainer.strategy fsdp", replace(parallelism, sharing="fsdp")
    if parallelism.sharded and parallelism.gathers_for_rollout and isinstance(module, RTOModule):
        yield "model.rollout.gather_weights false", replace(parallelism, gathers_for_rollout=False)


def _candidates(module: StageModule, data: Any, parallelism: Parallelism) -> Iterator[tuple[str, Any, str, Any]]:
    """(what a user types, module or data, attribute, value with the change)"""
    settings = module.settings
    if settings.mode == "full":
        adapters = replace(settings, mode="adapters")
        yield "model.backbone.mode adapters", module, "settings", adapters
        quantized = replace(adapters, quantization="nf4")
        yield "model.backbone.mode adapters and quantization nf4", module, "settings", quantized
    elif settings.quantization is None:
        yield "model.backbone.quantization nf4", module, "settings", replace(settings, quantization="nf4")
    if settings.dtype == "float32" and settings.quantization is None:
        yield "model.backbone.dtype bfloat16", module, "settings", replace(settings, dtype="bfloat16")
    if not settings.gradient_checkpointing:
        checkpointing = replace(settings, gradient_checkpointing=True)
        yield "model.backbone.gradient_checkpointing true", module, "settings", checkpointing
    if settings.logprob_chunk_tokens > _CHUNK_TOKENS:
        chunk = replace(settings, logprob_chunk_tokens=_CHUNK_TOKENS)
        yield f"model.backbone.logprob_chunk_tokens {_CHUNK_TOKENS}", module, "settings", chunk
    if isinstance(module, RTOModule):
        yield from _candidates_of_rto(module, data, parallelism)
    elif (times := data.batch_size // parallelism.processes) > 1:
        rows = parallelism.processes
        yield f"data.batch_size {rows} with trainer.accumulate_grad_batches times {times}", data, "batch_size", rows
    if not parallelism.sharded or settings.mode == "adapters":
        yield from _smaller_optimizers(module)


def _candidates_of_rto(module: RTOModule, data: Any, parallelism: Parallelism) -> Iterator[tuple[str, Any, str, Any]]:
    if module.ppo.microbatch_size > 1:
        yield "model.ppo.microbatch_size 1", module, "ppo", replace(module.ppo, microbatch_size=1)
    samples = data.batch_size // parallelism.processes * module.rollout_settings.responses_per_prompt
    sampled = module.rollout_settings.batch_size or samples
    if sampled > 1:
        rows = max(1, sampled // 4)
        yield (
            f"model.rollout.batch_size {rows}",
            module,
            "rollout_settings",
            replace(module.rollout_settings, batch_size=rows),
        )


def _smaller_optimizers(module: StageModule) -> Iterator[tuple[str, Any, str, Any]]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except Exception:  # a broken installation raises more than ImportError
        return
    for key in module.named_optimizers():
        attribute = "critic_optimizer" if key == "model.critic_optimizer" else "optimizer"
        yield f"{key} AdamW8bit", module, attribute, AdamW8bit


def _merged(into: Any, before: Any, after: Any) -> Any:
    """`into` with what is different in `after` from `before`."""
    if not hasattr(before, "__dataclass_fields__"):
        return after
    different = {
        name: getattr(after, name)
        for name in before.__dataclass_fields__
        if getattr(after, name) != getattr(before, name)
    }
    return replace(into, **different)
