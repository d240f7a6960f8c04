"""Prints the README's table of memory and communication on 1, 8 and 64 GPUs, as `rto-lightning plan` computes them.

    python -m tests.benchmarks.scaling_table

Nothing is measured, and no GPU is needed: configs/llama3_8b/rto.yaml with the shapes of Llama-3 of 8B and 70B, full
training and LoRA. Of the ways to spread a stage the first that fits is shown: copies of the model (ddp, for LoRA),
shares of it that are gathered for a rollout (fsdp), or a layer at a time at every token (fsdp, by layer); below the
last, what is left to do if vLLM servers sample (fsdp, vLLM).
"""

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rto_lightning import memory
from rto_lightning.cli.plan import read_stage

CONFIG = Path("configs/llama3_8b/rto.yaml")
PROMPTS = 1024
"""Of an iteration, as the file has it."""
BY_LAYER, BY_VLLM = "fsdp, by layer", "fsdp, vLLM"
DEVICE_BYTES = 80e9
RATES = memory.Rates()
SHAPES: dict[str, dict[str, int]] = {
    "8B": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336},
    "70B": {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672},
}
COMMON: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
COLUMNS = "model", "GPUs", "spread by", "memory", "received", "communication", "rollout", "scoring", "update"


@dataclass(frozen=True)
class Planned:
    """A stage on some devices."""

    spread_by: str
    peak: int
    costs: memory.CostPlan

    @property
    def fits(self) -> bool:
        """Whether a device of 80 GB holds it, if nothing is lost to fragments."""
        return self.peak <= DEVICE_BYTES

    def seconds(self, phase: str) -> tuple[float, float]:
        """Communication and computation of the phases whose names begin so."""
        received = sum(made.bytes for made in self.costs.transfers if made.phase.startswith(phase))
        computed = (
            max(made.operations / RATES.operations, made.read_bytes / RATES.memory)
            for made in self.costs.computations
            if made.phase.startswith(phase)
        )
        return received / RATES.link, sum(computed)


def ways(mode: str, processes: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(name, options), what communicates the least first."""
    if processes == 1:
        yield "-", ("--trainer.strategy", "auto")
        return
    if mode == "adapters":
        yield "ddp", ("--trainer.strategy", "ddp")
    yield "fsdp", ("--trainer.strategy", "fsdp")
    yield BY_LAYER, ("--trainer.strategy", "fsdp", "--model.rollout.gather_weights", "false")


def planned(model: Path, mode: str, processes: int) -> list[Planned]:
    """The first way that fits, or the one that takes the least memory; and with vLLM where that is slow."""
    made: list[Planned] = []
    for name, options in ways(mode, processes):
        made.append(plan(model, mode, processes, name, options))
        if made[-1].fits:
            break
    else:
        made.sort(key=lambda found: -found.peak)
    if made[-1].spread_by != BY_LAYER:
        return made[-1:]
    options = "--trainer.strategy", "fsdp", "--model.rollout.engine", "vllm", "--model.rollout.vllm.mode", "server"
    return [made[-1], plan(model, mode, processes, BY_VLLM, options)]


def plan(model: Path, mode: str, processes: int, name: str, options: Sequence[str]) -> Planned:
    """One way, whose held-out prompts are no more at a time than a device has in training."""
    held_out = str(min(64, PROMPTS // processes))
    settings = ["--model.backbone.mode", mode, "--model.backbone.model", str(model), "--data.eval_batch_size", held_out]
    folder = ["--trainer.default_root_dir", f"{model}/run"]
    with read_stage(["--config", str(CONFIG), *settings, *folder, *options]) as (module, data, trainer):
        parallelism = memory.planned_parallelism(trainer, module, processes)
        workload = memory.workload_of(module, data, str(trainer.precision), parallelism)
        made = memory.plan_memory(workload, foreach=True)
        return Planned(name, made.peak, memory.plan_costs(workload, made))


def row(name: str, processes: int, found: Planned) -> str:
    """One line of the table; seconds of a phase are those of communication and, after a plus, of computation."""
    received = sum(made.bytes for made in found.costs.transfers)
    phases = [found.seconds(phase) for phase in ("rollout", "scoring", "update")]
    seconds = [f"{sent:,.0f} + {computed:,.0f} s" for sent, computed in phases]
    if found.spread_by == BY_VLLM:
        seconds[0] = f"{phases[0][0]:,.0f} s + vLLM's"
    cells = [
        name,
        str(processes),
        found.spread_by,
        f"{found.peak / 1e9:,.0f} GB" + ("" if found.fits else " (does not fit)"),
        f"{received / 1e9:,.0f} GB" if received else "-",
        f"{received / RATES.link:,.0f} s" if received else "-",
        *seconds,
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            model = Path(folder, name)
            model.mkdir()
            (model / "config.json").write_text(json.dumps({**COMMON, **SHAPES[name]}), encoding="utf-8")
            for kind, mode in (("full", "full"), ("LoRA", "adapters")):
                for processes in options.processes:
                    for found in planned(model, mode, processes):
                        print(row(f"{name} {kind}", processes, found), flush=True)


if __name__ == "__main__":
    main()
