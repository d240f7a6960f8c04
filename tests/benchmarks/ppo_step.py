"""Seconds and peak memory of one PPO iteration: RTO and PPO here, TRL's last PPO trainer, and the floor; run by hand.

    python tests/benchmarks/ppo_step.py --model MODEL_FOLDER --trl-python TRL_ENVIRONMENT/bin/python
    python tests/benchmarks/ppo_step.py --random --dtype float32 bfloat16      without TRL, on random weights
    python tests/benchmarks/ppo_step.py --random --sweep                       cost over length and batch, without TRL
    python tests/benchmarks/ppo_step.py --tiny                                 a trial of the machinery, a minute

SmolLM2-135M, LoRA r=8 on all linear layers, 16 prompts of 32 tokens, 48 new tokens each, 1 epoch, 1 minibatch,
micro-batches of 4, 2 threads. Every contender runs in a fresh process, so that its peak memory is its own, and in
turns with the others (A B C A B C), so that a drift of the machine hits all alike. Ratios come from one run only. The
last line of the output is one JSON object with everything. `ppo_step_report.py` says what the sides do differently.

TRL runs in an environment of its own, made by

    python -m venv TRL_ENVIRONMENT
    TRL_ENVIRONMENT/bin/pip install torch==2.13.0 trl==1.12.0 peft==0.21.2 transformers==5.23.0 datasets

with the versions of torch, peft and transformers that this project's environment has. Linux only.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # as a script is started

from tests.benchmarks.ppo_step_report import (  # noqa: E402
    DIFFERENCES,
    OURS,
    TRL,
    summarize,
    sweep_table,
    tables,
    target_lines,
    wrong_counts,
)
from tests.benchmarks.ppo_step_work import Measured, Work, set_environment  # noqa: E402

MODULES = {
    "prepare": "models",
    "floor": "floor",
    **dict.fromkeys(OURS, "ours"),
    **dict.fromkeys(TRL, "trl"),
}
CONTENDERS = [name for name in MODULES if name != "prepare"]
SWEEP = [(16, tokens) for tokens in (32, 64, 128, 256, 512)] + [(prompts, 48) for prompts in (8, 16, 32, 64)]
"""Prompts and new tokens of the points of `--sweep`."""


def main() -> int:
    """Read the command line, measure, and print; returns 1 if a contender failed or did other work."""
    options = read_options()
    source = str(Path(options.model).resolve()) if options.model else None
    trl_python = os.path.abspath(options.trl_python) if options.trl_python else None  # a link that must stay one
    base = Work("", source, options.tiny, dtype="float32", threads=options.threads)
    base = replace(base, iterations=options.iterations, new_tokens=8 if options.tiny else base.new_tokens)
    names = [name for name in options.contenders if name not in TRL or options.trl_python]
    if len(names) < len(options.contenders):
        print("TRL is left out: give --trl-python.")
    document: dict[str, Any] = {"machine": machine(options), "runs": [], "sweep": []}
    problems: list[str] = []
    for dtype in options.dtype:
        if options.sweep:
            points = [(4, 8), (8, 8)] if options.tiny else SWEEP
            for prompts, new_tokens in points:
                work = replace(base, dtype=dtype, prompts=prompts, new_tokens=new_tokens, iterations=1)
                document["sweep"].append(run(work, ["floor", "rto"], 1, None, problems))
            print(f"\n{dtype}\n\n" + sweep_table([point for point in document["sweep"] if point["dtype"] == dtype]))
        else:
            document["runs"].append(run(replace(base, dtype=dtype), names, options.rounds, trl_python, problems))
            print(f"\n{dtype}\n\n{tables(document['runs'][-1]['summary'])}\n")
    if not options.sweep:
        print(f"{DIFFERENCES}\n")
        for measured in document["runs"]:
            if measured["dtype"] == "float32" and not options.tiny:
                print(target_lines(measured["summary"]))
    document["problems"] = problems
    print("\n".join(problems))
    print(json.dumps(document))
    return int(bool(problems))


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="folder of SmolLM2-135M-Instruct, or of another model with safetensors weights")
    model.add_argument("--random", action="store_true", help="random weights of the same shape")
    model.add_argument("--tiny", action="store_true", help="a random model of two layers; its figures mean nothing")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--trl-python", help="Python of TRL's environment")
    parser.add_argument("--rounds", type=int, default=2, help="turns of every contender; default 2")
    parser.add_argument("--iterations", type=int, default=2, help="iterations of a turn after the warm-up; default 2")
    parser.add_argument("--threads", type=int, default=2, help="threads of a contender; default 2")
    parser.add_argument("--sweep", action="store_true", help="instead: responses of 32 to 512 tokens, 8 to 64 prompts")
    return parser.parse_args()


def run(work: Work, names: Sequence[str], rounds: int, trl_python: str | None, problems: list[str]) -> dict[str, Any]:
    """Prepare a folder and let the contenders take turns.

    Args:
        work: what they do; the folder is set here.
        names: the contenders.
        rounds: turns of each.
        trl_python: the Python that runs those of TRL.
        problems: gets a sentence for each contender that failed or did other work.

    Returns:
        The shapes, and the `summary`.
    """
    with tempfile.TemporaryDirectory(prefix="ppo_step_") as folder:
        work = replace(work, folder=folder)
        work.write(Path(folder) / "work.json")
        start(work, "prepare", sys.executable)
        measured: dict[str, list[Measured]] = {name: [] for name in names}
        for number in range(1, rounds + 1):
            for name in list(measured):
                try:
                    result = start(work, name, trl_python if name in TRL and trl_python else sys.executable)
                except ContenderError as error:
                    problems.append(str(error))
                    print(error, flush=True)
                    del measured[name]  # the others still can be compared
                    continue
                measured[name].append(result)
                print(f"round {number}: {name}, {_describe(result)}", flush=True)
    problems += wrong_counts(work, measured)
    shapes = {"dtype": work.dtype, "prompts": work.prompts, "new_tokens": work.new_tokens}
    rest: dict[str, Any] = {"prompt_tokens": work.prompt_tokens, "microbatch": work.microbatch, "rank": work.rank}
    rest["model"] = "random" if work.source is None else Path(work.source).name
    return {**shapes, **rest, "rounds": rounds, "iterations": work.iterations, "summary": summarize(measured)}


class ContenderError(Exception):
    """A contender's process ended in an error; the text holds the end of its output."""


def start(work: Work, name: str, python: str) -> Measured:
    """Run a contender, or `prepare`, in a process of its own.

    Raises:
        ContenderError: if it fails.
    """
    folder = Path(work.folder)
    result, log = folder / f"{name}.json", folder / f"{name}.log"
    module = f"tests.benchmarks.ppo_step_{MODULES[name]}"
    command = [python, "-m", module, name, str(folder / "work.json"), str(result)]
    with log.open("w", encoding="utf-8") as output:
        code = subprocess.run(
            command, cwd=ROOT, env=set_environment(work.threads), stdout=output, stderr=subprocess.STDOUT
        ).returncode
    if code != 0:
        end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        if name == "prepare":
            raise SystemExit(end)
        raise ContenderError(f"{name} failed with exit code {code}:\n{end}")
    measured: Measured = json.loads(result.read_text(encoding="utf-8"))
    return measured


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on beside the work; versions of packages stand with each contender."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": options.threads,
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def _describe(result: Measured) -> str:
    parts = [f"{name} {value[-1]:.2f}" for name, value in result["phases"].items()]
    seconds = f"{result['seconds'][-1]:.2f} s (" if "seconds" in result else "("
    return f"{seconds}{', '.join(parts)}), {result['memory']['peak'] / 1e9:.2f} GB"


if __name__ == "__main__":
    sys.exit(main())
