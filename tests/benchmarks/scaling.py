"""Seconds and memory of an RTO iteration on one process and on several of one machine; run by hand.

    python tests/benchmarks/scaling.py --model MODEL_FOLDER              1 and 2 processes of one CPU core each
    python tests/benchmarks/scaling.py --model MODEL_FOLDER --accelerator gpu --processes 1 8
    python tests/benchmarks/scaling.py --tiny                            a trial of the script itself

The same global batch every time, so that ideally two processes take half of the seconds. Medians of the iterations
after the first; peak memory is that of the first process. On a CPU each process gets one thread. The last line is one
JSON object.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
PHASES = ("rollout", "scoring", "update", "iteration")
RUNS: list[tuple[str, dict[str, Any]]] = [
    ("ddp", {}),
    ("fsdp", {}),
    ("fsdp", {"model.rollout.gather_weights": False}),
]
"""Strategies on several processes, with further settings."""


def main() -> int:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, help="folder of a causal language model")
    model.add_argument("--tiny", action="store_true", help="a random model of two layers; its figures mean nothing")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompts", type=int, default=16, help="of the global batch")
    parser.add_argument("--new_tokens", type=int, default=48)
    parser.add_argument("--iterations", type=int, default=3, help="the first is not counted")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(prefix="scaling_") as name:
        folder = Path(name)
        source = options.model or _tiny_model(folder)
        _write_prompts(folder / "prompts.jsonl", options.prompts)
        for processes in options.processes:
            for strategy, settings in RUNS if processes > 1 else [("auto", {})]:
                label = f"{strategy}{'' if settings.get('model.rollout.gather_weights', True) else ', layer by layer'}"
                stage = folder / f"{processes}-{len(results)}"
                result = _run(source, folder, stage, strategy, processes, settings, options)
                results.append({"processes": processes, "strategy": label, **result})
                print(json.dumps(results[-1]), flush=True)
    print("\n" + _table(results) + "\n")
    print(json.dumps({"runs": results, **{k: str(v) for k, v in vars(options).items()}}))
    return 0


def _run(
    model: Path, folder: Path, stage: Path, strategy: str, processes: int, settings: dict[str, Any], options: Any
) -> dict[str, Any]:
    config = {
        "seed_everything": 1,
        "trainer": {
            "default_root_dir": str(stage),
            "accelerator": options.accelerator,
            "devices": processes,
            "strategy": strategy,
            "max_steps": options.iterations,
            "num_sanity_val_steps": 0,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
        },
        "model": {
            "class_path": "rto_lightning.modules.RTOModule",
            "init_args": {
                "backbone": {"model": str(model), "lora": {"rank": 8, "alpha": 16}, "chat_template": "plain"},
                "reward_function": "tests.benchmarks.scaling:length",
                "rollout": {"max_new_tokens": options.new_tokens},
                "rewards": {"beta_1": 0.0, "normalize_score": False},
                "ppo": {"microbatch_size": 4},
                "critic": {"init": "policy"},
            },
        },
        "data": {
            "class_path": "rto_lightning.data.PromptDataModule",
            "init_args": {"train": str(folder / "prompts.jsonl"), "batch_size": options.prompts},
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    overrides = [f"--{name}={value}" for name, value in settings.items()]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), "-m", "rto_lightning", "fit"]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if options.accelerator == "cpu" else {}
    environment = {**os.environ, **threads, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--config", str(path), *overrides], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SystemExit(done.stdout[-1000:] + done.stderr[-3000:])
    with (stage / "metrics/fit/metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/seconds/iteration")][1:]
    seconds = {phase: median(float(row[f"train/seconds/{phase}"]) for row in rows) for phase in PHASES}
    return {**seconds, "peak": json.loads((stage / "memory.json").read_text())["measured_peak"]}


def length(prompts: list[Any], responses: list[str]) -> list[float]:
    """A reward that costs nothing."""
    return [len(response) / 100 for response in responses]


def _table(results: list[dict[str, Any]]) -> str:
    alone = next(result for result in results if result["processes"] == 1)
    lines = ["| processes | strategy | seconds | rollout | scoring | update | of one process | peak memory of one |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for r in results:
        seconds = " | ".join(f"{r[phase]:.1f}" for phase in ("iteration", "rollout", "scoring", "update"))
        share = r["iteration"] / alone["iteration"]
        lines.append(f"| {r['processes']} | {r['strategy']} | {seconds} | {share:.2f} | {r['peak'] / 1e9:.2f} GB |")
    return "\n".join(lines)


def _write_prompts(path: Path, prompts: int) -> None:
    words = [
        "tell",
        "me",
        "how",
        "rivers",
        "find",
        "the",
        "sea",
        "and",
        "why",
        "old",
        "maps",
        "show",
        "them",
        "where",
        "there",
        "are",
        "none",
        "now",
    ]
    rows = [" ".join(words[(n + k) % len(words)] for k in range(24)) for n in range(8 * prompts)]
    path.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))


def _tiny_model(folder: Path) -> Path:
    sys.path.insert(0, str(ROOT))
    from tests.models import write_tiny_model

    return write_tiny_model(folder / "model")


if __name__ == "__main__":
    sys.exit(main())
