"""Sample efficiency of RTO and its relatives on the embedded task, run by hand.

    python tests/benchmarks/sample_efficiency.py run [--workers 2] [--only 'sum/ppo/*'] [--quick]
    python tests/benchmarks/sample_efficiency.py status
    python tests/benchmarks/sample_efficiency.py report

How many sampled responses does each method need for the gold reward that PPO ends with, and how far does it get, at
equal reward model, critic, learning rates and KL coefficient? `protocol.py` says what is run. `run` can be stopped at
any time and goes on where it was: every finished run (cell) is a small file in the work folder. Several `run` may
share a folder. `report` merges the cells into sample_efficiency.json, and draws table and figure from that file alone,
so that it works without the work folder too. `--quick` is a trial of the machinery: its figures mean nothing.
"""

import argparse
import multiprocessing
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # as a script is started; the workers inherit it

from tests.benchmarks.plan import stages  # noqa: E402
from tests.benchmarks.protocol import FULL, QUICK, Protocol, with_preference_methods  # noqa: E402
from tests.benchmarks.records import read_cells  # noqa: E402


def main() -> int:
    """Read the command line and do what it asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "status", "report"))
    parser.add_argument("--work", type=Path, help="folder of the cells; default outputs/sample_efficiency[_quick]")
    parser.add_argument("--workers", type=int, default=2, help="processes, each with one thread; default 2")
    parser.add_argument("--only", default="*", help="run cells whose name matches, as 'sum/rto*'")
    parser.add_argument("--quick", action="store_true", help="three iterations, one seed; proves nothing")
    options = parser.parse_args()
    name = "sample_efficiency_quick" if options.quick else "sample_efficiency"
    work = (options.work or ROOT / "outputs" / name).resolve()
    protocol = with_preference_methods(QUICK if options.quick else FULL)
    if options.command == "run":
        return run(protocol, work, options.workers, options.only)
    if options.command == "status":
        print(status(protocol, work))
        return 0
    from tests.benchmarks.report import write_report

    # A trial must not replace the committed figures.
    write_report(protocol, work, work if options.quick else HERE)
    return 0


def run(protocol: Protocol, work: Path, workers: int, only: str) -> int:
    """Work in processes of their own, and return how many of them ended in an error."""
    from tests.benchmarks.workers import claim, work_on

    claim(protocol, work)
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1")  # before they import torch
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit ends the workers, being daemons
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work_on, args=(protocol, work, only), daemon=True) for _ in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    print(status(protocol, work))
    broken = [process.exitcode for process in processes if process.exitcode != 0]
    if broken:
        print(f"Of {workers} workers {len(broken)} ended early, with exit codes {broken}; run again to go on.")
    return len(broken)


def status(protocol: Protocol, work: Path) -> str:
    """How far each stage is, what failed, and how long the rest will take."""
    records = read_cells(work)
    lines, missing = [], 0
    for stage in stages(protocol, records):
        done = sum(cell.name in records for cell in stage.cells)
        missing += stage.size - done
        lines.append(f"{stage.letter} {stage.gold:<12} {done:>3} of {stage.size}")
    failed = [f"{name}: {record['error']}" for name, record in records.items() if record["error"] is not None]
    diverged = [name for name, record in records.items() if record["diverged"]]
    if records:
        mean = sum(record["seconds"]["all"] for record in records.values()) / len(records)
        lines.append(
            f"{mean:.0f} s a cell; at most {missing * mean / 3600:.1f} worker-hours to go, without preparation"
        )
    lines += [f"failed: {text}" for text in failed] + [f"diverged: {name}" for name in diverged]
    if failed:
        lines.append(f"To run a failed cell again, remove its file below {work / 'cells'}.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
