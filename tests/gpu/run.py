"""Numerics, memory and speed on one CUDA card, run by hand.

    python tests/gpu/run.py                              everything, under nine minutes on an H100
    python tests/gpu/run.py --only numerics              the device against the CPU
    python tests/gpu/run.py --only memory                RTO iterations on a random NF4 Llama of 8B
    python tests/gpu/run.py --device cpu --tiny          a trial of the script itself

Needs no download. What is measured is shown as it comes; the last line is one JSON object, which `--output` also writes
to a file, after each part. Lengths and batch are options: `--prompts 8 --microbatch 1` for a card of 16 GB.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # as a script is started
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402

from tests.gpu import memory_and_speed, numerics  # noqa: E402
from tests.gpu.shapes import TINY_ITERATION, TINY_NUMERICS, IterationShape, NumericsShape  # noqa: E402

PARTS = ("numerics", "memory")
SIZES = ("prompts", "prompt_tokens", "response_tokens", "microbatch", "iterations")
"""Fields of IterationShape that are options."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and run the parts; returns 1 if the device disagrees with the CPU, else 0."""
    start = time.monotonic()
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    result: dict[str, Any] = {"device": describe(device)}
    print(json.dumps(result["device"]), flush=True)
    for part in PARTS:
        if options.only in (None, part):
            began = time.monotonic()
            print(f"\n== {part}", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                result[part] = _run(part, device, options, Path(folder), start + options.time_limit)
            result[part]["seconds"] = time.monotonic() - began
            if options.output is not None:
                options.output.write_text(json.dumps(result, indent=1) + "\n")
    failures = result.get("numerics", {}).get("failures", [])
    for failure in failures:
        print(f"TOO FAR APART: {failure}")
    print(json.dumps(result), flush=True)
    return 1 if failures else 0


def describe(device: torch.device) -> dict[str, Any]:
    """The machine and the versions that a figure depends on."""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "lightning")
    card: dict[str, Any] = {"card": platform.processor() or platform.machine()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        card = {"card": properties.name, "bytes": properties.total_memory, "cuda": torch.version.cuda}
    return {**card, "python": platform.python_version(), **{name: version(name) for name in packages}}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu for a trial")
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--tiny", action="store_true", help="tiny models: tries the script, measures nothing")
    parser.add_argument("--output", type=Path, help="file for the JSON object")
    parser.add_argument("--peak-tflops", type=float, help="of the card in bfloat16; default by its name")
    parser.add_argument("--precision", help="of the trainer; default bf16-mixed, on a CPU 32-true")
    parser.add_argument("--time-limit", type=float, default=520.0, help="seconds after which no iteration begins")
    for name in SIZES:
        help_text = f"of an RTO iteration; default {getattr(IterationShape(), name)}"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=help_text)
    return parser


def _run(part: str, device: torch.device, options: argparse.Namespace, folder: Path, deadline: float) -> dict[str, Any]:
    if part == "numerics":
        records = numerics.compare(device, TINY_NUMERICS if options.tiny else NumericsShape(), folder, _show)
        return {"records": records, "failures": numerics.failures(records)}
    given = {field.name: getattr(options, field.name, None) for field in fields(IterationShape)}
    shape = replace(
        TINY_ITERATION if options.tiny else IterationShape(),
        **{name: value for name, value in given.items() if value is not None},
    )
    precision = options.precision or ("bf16-mixed" if device.type == "cuda" else "32-true")
    return memory_and_speed.measure(device, shape, precision, deadline, folder, options.peak_tflops, _show)


def _show(line: str) -> None:
    print(line, flush=True)


def _quiet() -> None:
    """Nothing but the tables: no progress bars of loading, no tips."""
    import logging

    import transformers

    transformers.utils.logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


if __name__ == "__main__":
    _quiet()
    sys.exit(main())
