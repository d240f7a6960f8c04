"""Memory of a data module on few and on many rows, held and streamed; run by hand.

    python -m tests.benchmarks.data_memory --rows 10000 1000000

Generates preference rows of some hundred bytes and goes through an epoch of them with the tokenizer of single bytes,
in a fresh process for each line of the table:

- anonymous memory: what belongs to the process alone, at its peak, beyond that of the imports;
- mapped pages: pages of files that happen to be in memory at the end, those of the libraries too, which the system
  takes back when it needs them.

Linux only: it reads /proc.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

MODES = ("held", "held, again", "streamed")
BATCH = 64
WORDS = ("the", "of", "and", "to", "in", "is", "that", "was", "for", "on", "are", "with", "they", "be", "one", "have")


def generate(path: Path, rows: int) -> None:
    """Preference rows whose texts are words in a random order."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(rows):
            texts = [" ".join(draw.choices(WORDS, k=count)) for count in (12, draw.randint(5, 40), draw.randint(5, 40))]
            row = {"prompt": f"{number}: {texts[0]}?", "chosen": texts[1], "rejected": texts[2]}
            file.write(json.dumps(row) + "\n")


def mebibytes(kind: str) -> float:
    """`RssAnon`, `RssFile` or another memory of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(kind)


class Peak:
    """Watches anonymous memory, from a thread, every few milliseconds."""

    def __init__(self) -> None:
        self.start = self.most = mebibytes("RssAnon")
        threading.Thread(target=self._watch, daemon=True).start()

    def beyond_start(self) -> float:
        """MiB at the peak so far, less those at the start."""
        return self.most - self.start

    def _watch(self) -> None:
        while True:
            self.most = max(self.most, mebibytes("RssAnon"))
            time.sleep(0.005)


def measure(source: str, mode: str) -> dict[str, Any]:
    """Of one epoch, in this process."""
    from rto_lightning.backbone.chat import ChatTokenizer
    from rto_lightning.data import PreferenceDataModule
    from tests.tiny import tiny_tokenizer

    chat = ChatTokenizer(tiny_tokenizer())
    chat.encode_prompts([[{"role": "user", "content": "Hi"}]])
    peak, started = Peak(), time.perf_counter()
    data = PreferenceDataModule(train=source, batch_size=BATCH, streaming=mode == "streamed", seed=0)
    data.chat = chat
    data.setup("fit")
    loader = data.train_dataloader()
    first = next(iter(loader))
    ready, at_start = time.perf_counter(), peak.beyond_start()
    loader = data.train_dataloader()
    batches = sum(1 for _ in loader)
    return {
        "mode": mode,
        "tokens": first.sequences.input_ids.numel() // len(first),
        "ready_seconds": ready - started,
        "ready_mib": at_start,
        "epoch_seconds": time.perf_counter() - ready,
        "epoch_mib": peak.beyond_start(),
        "mapped_mib": mebibytes("RssFile"),
        "batches": batches,
    }


def run(rows: int, folder: Path) -> list[dict[str, Any]]:
    """Every mode on so many rows, each in a process of its own."""
    source = folder / f"{rows}.jsonl"
    generate(source, rows)
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache")}
    results = []
    for mode in MODES:
        command = [sys.executable, "-m", "tests.benchmarks.data_memory", "--source", str(source), "--mode", mode]
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        results.append(
            {"rows": rows, "source_mib": source.stat().st_size / 2**20, **json.loads(done.stdout.splitlines()[-1])}
        )
        print(json.dumps(results[-1]), file=sys.stderr)
    return results


def table(results: list[dict[str, Any]]) -> str:
    """The results in Markdown."""
    lines = [
        "| rows | source | mode | first batch after | anonymous memory then | after an epoch | mapped pages | rows/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        cells = (
            f"{result['rows']:,}",
            f"{result['source_mib']:,.0f} MiB",
            result["mode"],
            f"{result['ready_seconds']:.1f} s",
            f"+{result['ready_mib']:.0f} MiB",
            f"+{result['epoch_mib']:.0f} MiB",
            f"{result['mapped_mib']:.0f} MiB",
            f"{result['batches'] * BATCH / result['epoch_seconds']:,.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs all, or what one process of it does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--source", help=argparse.SUPPRESS)
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.source is not None:
        print(json.dumps(measure(arguments.source, arguments.mode)))
        return
    with tempfile.TemporaryDirectory() as folder:
        results = []
        for rows in arguments.rows:
            results += run(rows, Path(folder))
        print(table(results))


if __name__ == "__main__":
    main()
