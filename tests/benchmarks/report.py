"""Merges the cells, if there are any, and draws table and figure from the merged file."""

from pathlib import Path

from tests.benchmarks.document import collect, write_document
from tests.benchmarks.figure import draw
from tests.benchmarks.protocol import Protocol
from tests.benchmarks.records import read_json
from tests.benchmarks.tables import markdown

NAME = "sample_efficiency"


def write_report(protocol: Protocol, work: Path, output: Path) -> None:
    """Write sample_efficiency.json, .md and .png.

    Args:
        protocol: what was to be run.
        work: folder of the cells; without cells the file in `output` is drawn as it is.
        output: where the three files go.
    """
    kept = output / f"{NAME}.json"
    if (work / "cells").is_dir():
        write_document(kept, collect(protocol, work))
    elif not kept.exists():
        raise SystemExit(f"There are no cells in {work} and there is no {kept}; run the benchmark first.")
    document = read_json(kept)
    draw(document, output / f"{NAME}.png")
    (output / f"{NAME}.md").write_text(markdown(document, f"{NAME}.png"), encoding="utf-8")
    print(f"{kept} ({kept.stat().st_size / 1000:.0f} kB), .md and .png beside it; {document['missing']} runs missing")
