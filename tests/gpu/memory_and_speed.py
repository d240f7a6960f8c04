"""Real RTO iterations on a random NF4 Llama: peak memory and tokens a second of each phase.

Five roles (policy, reference, dpo, reward, critic) on one base, trained by Lightning as a user's run is. Responses have
full length, since the stop id that is set does not occur.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from rto_lightning.backbone import BackboneSettings
from rto_lightning.modules import RTOModule
from rto_lightning.modules.rto_settings import PPOSettings
from rto_lightning.rollout import RolloutSettings
from tests.gpu.arithmetic import Work, peak_tflops
from tests.gpu.random_llama import random_weights, write_folder, write_roles
from tests.gpu.shapes import IterationShape
from tests.gpu.training import Prompts, make_trainer, prompt_batch

Phase = dict[str, Any]
"""`iteration`, `phase`, `seconds`, `tokens`, `tokens_per_second`, `flops`, `share_of_peak`, and `peak_allocated` and
`peak_reserved` in bytes, None on a CPU."""


class MeasuredRTO(RTOModule):
    """RTO that notes what each phase took.

    `tokens` are those sampled (rollout), or prompt and response tokens of all samples, each counted once although
    several roles read them (scoring, update).
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.measured: list[Phase] = []
        self.report: Callable[[Phase], None] = lambda phase: None

    def configure_model(self) -> None:
        """Load base and roles, measured once."""
        if hasattr(self, "backbone"):
            super().configure_model()
            return
        with self._phase("loading"):
            super().configure_model()

    def rollout(self, *arguments: Any, **options: Any) -> Any:
        """As RTO's, measured."""
        with self._phase("rollout") as phase:
            trajectory = super().rollout(*arguments, **options)
            phase["tokens"] = int(trajectory.sequences.response_lengths.sum())
        return trajectory

    def make_experience(self, trajectory: Any, *arguments: Any, **options: Any) -> Any:
        """As RTO's, measured."""
        with self._phase("scoring") as phase:
            phase["tokens"] = int(trajectory.sequences.attention_mask.sum())
            return super().make_experience(trajectory, *arguments, **options)

    def update(self, experience: Any, *arguments: Any, **options: Any) -> Any:
        """As RTO's, measured."""
        with self._phase("update") as phase:
            phase["tokens"] = int(experience.trajectory.sequences.attention_mask.sum())
            return super().update(experience, *arguments, **options)

    @contextmanager
    def _phase(self, name: str) -> Iterator[Phase]:
        phase: Phase = {"iteration": self.global_step, "phase": name, "tokens": 0}
        device = self.trainer.strategy.root_device
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        yield phase
        if cuda:
            torch.cuda.synchronize(device)
        phase["seconds"] = time.perf_counter() - start
        phase["peak_allocated"] = torch.cuda.max_memory_allocated(device) if cuda else None
        phase["peak_reserved"] = torch.cuda.max_memory_reserved(device) if cuda else None
        self.measured.append(phase)
        self.report(phase)


def random_prompts(shape: IterationShape, vocabulary: int) -> Prompts:
    """Prompts of one length, without padding, whose ids are below `vocabulary`."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.prompts, shape.prompt_tokens)
    ids = [torch.randint(3, vocabulary, size, generator=generator) for _ in range(shape.iterations)]
    return Prompts([prompt_batch(rows, torch.ones_like(rows), n * shape.prompts) for n, rows in enumerate(ids)])


class StopInTime(Callback):
    """Ends training when one more iteration as long as the last would pass a moment.

    Args:
        deadline: by `time.monotonic()`.
    """

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.started = 0.0

    def on_train_batch_start(self, *arguments: Any) -> None:
        """Note the time."""
        self.started = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        """Stop if the last iteration would not fit once more."""
        now = time.monotonic()
        trainer.should_stop = now + (now - self.started) > self.deadline


def measure(
    device: torch.device,
    shape: IterationShape,
    precision: str,
    deadline: float,
    folder: Path,
    peak: float | None,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Run the iterations, report each phase as it ends, and return everything.

    Args:
        device: a CUDA device, or the CPU for a trial.
        shape: model and lengths.
        precision: of the trainer; `bf16-mixed` on a card.
        deadline: by `time.monotonic()`; no iteration is begun that would probably end later.
        folder: for the roles, empty.
        peak: of the card in bfloat16, in TFLOP/s; None takes it by the card's name.
        report: shows a line.
    """
    model = write_folder(folder / "model", shape.model)
    roles = write_roles(model, folder / "roles", shape.lora)
    module = MeasuredRTO(
        BackboneSettings(
            str(model),
            dtype="bfloat16" if device.type == "cuda" else "float32",
            quantization="nf4",
            lora=shape.lora,
            gradient_checkpointing=True,
        ),
        dpo=roles["dpo"],
        reward=roles["reward"],
        rollout=RolloutSettings(max_new_tokens=shape.response_tokens),
        ppo=PPOSettings(microbatch_size=shape.microbatch),
        seed=1,
    )
    vocabulary = shape.model["vocab_size"]
    module.chat.stop_ids = (vocabulary,)  # no token has this id
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = peak or peak_tflops(name)
    stop = StopInTime(deadline)
    trainer = make_trainer(device, folder, shape.iterations, stop, precision=precision)

    def finish(phase: Phase) -> None:
        phase |= _rates(phase, _work(module, shape), peak)
        report(row(phase))

    module.report = finish
    report(header())
    with random_weights():
        trainer.fit(module, random_prompts(shape, vocabulary))
    base, total = base_bytes(module)
    metrics = trainer.callback_metrics
    result = {
        "card": name,
        "peak_tflops": peak,
        "precision": precision,
        "prompts": shape.prompts,
        "prompt_tokens": shape.prompt_tokens,
        "response_tokens": shape.response_tokens,
        "microbatch": shape.microbatch,
        "roles": sorted(module.backbone.roles),
        "base_bytes": base,
        "copies_of_the_base": total / base,
        "phases": module.measured,
        "gradient_norms": {role: float(metrics[f"train/{role}/gradient_norm"]) for role in ("policy", "critic")},
        "peak_allocated": max((p["peak_allocated"] for p in module.measured if p["peak_allocated"]), default=None),
        "peak_reserved": max((p["peak_reserved"] for p in module.measured if p["peak_reserved"]), default=None),
    }
    report(summary(result))
    return result


def _work(module: MeasuredRTO, shape: IterationShape) -> dict[str, int]:
    model: Any = module.backbone.models["base"]
    work = Work.of(model.config)
    lengths = (shape.prompts, shape.prompt_tokens, shape.response_tokens)
    return {name: getattr(work, name)(*lengths) for name in ("rollout", "scoring", "update")} | {"loading": 0}


def _rates(phase: Phase, work: dict[str, int], peak: float | None) -> Phase:
    flops, seconds = work[phase["phase"]], phase["seconds"]
    share = flops / seconds / (peak * 1e12) if peak else None
    return {"tokens_per_second": phase["tokens"] / seconds, "flops": flops, "share_of_peak": share}


def base_bytes(module: RTOModule) -> tuple[int, int]:
    """Bytes that one copy of the base has by the shapes of its layers, and those of all frozen weights in memory.

    Adapters and heads are left out of both; the second counts each storage once.
    """
    storages: dict[int, int] = {}
    for name, parameter in module.backbone.named_parameters():
        if "lora_" in name or name.startswith("heads."):
            continue
        state = getattr(parameter, "quant_state", None)
        nested = state.state2 if state is not None else None
        tensors = [parameter, *([state.absmax, state.code] if state else []), *([nested.absmax] if nested else [])]
        for tensor in tensors:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    model: Any = module.backbone.models["base"]
    config, work = model.config, Work.of(model.config)
    others = 2 * work.output_weights + config.hidden_size * (2 * config.num_hidden_layers + 1)  # embeddings, norms
    # A 4-bit weight, its share of a scale of 64 weights in a byte, and of a scale of 256 such scales in four bytes.
    expected = work.body_weights * (1 / 2 + 1 / 64 + 4 / (64 * 256)) + others * model.dtype.itemsize
    return round(expected), sum(storages.values())


# Text -------------------------------------------------------------------------------------------------------------


def header() -> str:
    """The head of the table of phases."""
    left = f"{'iteration':>9} {'phase':<8} {'seconds':>8} {'tokens/s':>9}"
    return f"{left} {'of peak':>8} {'allocated':>10} {'reserved':>9}"


def row(phase: Phase) -> str:
    """A phase as a row of the table."""
    share = "" if phase["share_of_peak"] is None or not phase["flops"] else f"{phase['share_of_peak']:.1%}"
    rate = f"{phase['tokens_per_second']:.0f}" if phase["tokens"] else ""
    memory = [gigabytes(phase[key]) for key in ("peak_allocated", "peak_reserved")]
    name, seconds = f"{phase['iteration']:>9} {phase['phase']:<8}", f"{phase['seconds']:>8.2f}"
    return f"{name} {seconds} {rate:>9} {share:>8} {memory[0]:>10} {memory[1]:>9}"


def summary(result: dict[str, Any]) -> str:
    """What the iterations were, below the table."""
    return (
        f"{result['card']}, {result['prompts']} prompts of {result['prompt_tokens']} tokens, responses of "
        f"{result['response_tokens']}, microbatch {result['microbatch']}, {result['precision']}, NF4, gradient "
        f"checkpointing; roles {', '.join(result['roles'])}\n"
        f"base {gigabytes(result['base_bytes'])}, copies in memory {result['copies_of_the_base']:.2f}; peak "
        f"{gigabytes(result['peak_allocated'])} allocated, {gigabytes(result['peak_reserved'])} reserved"
    )


def gigabytes(count: int | None) -> str:
    """Bytes in GB of 10^9, or `-`."""
    return "-" if count is None else f"{count / 1e9:.2f} GB"
