"""From cells to the kept file, and from the kept file alone to table and figure."""

import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.document import rounded, write_document
from tests.benchmarks.figure import mean_curve
from tests.benchmarks.plan import Cell, stages
from tests.benchmarks.protocol import FULL, Method, Protocol
from tests.benchmarks.records import read_json, write_json
from tests.benchmarks.report import write_report
from tests.benchmarks.tables import bracket, number, settings_text, table

PROTOCOL = replace(FULL, preference_methods=(Method("ipo", "IPO", {"model.loss": "ipo"}),))


def record(cell: Cell) -> dict[str, Any]:
    """What a cell might have measured: a curve that climbs, RTO's twice as fast as the others'."""
    rng = random.Random(cell.name)
    speed = 0.1 if cell.method == "rto" else 0.05
    gold = [speed * i + rng.uniform(-0.05, 0.05) for i in range(cell.iterations)]
    kl = [0.2 * i for i in range(cell.iterations)]
    measured = {"gold": gold[-1] if gold else 0.5, "kl": 7.9, "length": 11.5}
    result: dict[str, Any] = {
        "seed": cell.seed,
        "commit": "0123456789",
        "error": None,
        "diverged": False,
        "seconds": {"training": 10.0, "all": 12.0},
        "validation": measured,
        "test": measured,
        "curves": {name: gold if name == "gold" else kl for name in ("gold", "kl", "score", "length", "truncated")},
    }
    if cell.method == "ddpo" and cell.seed == 5:
        result |= {"error": "ValueError: probabilities", "validation": None, "test": None, "curves": None}
    return result


def fill(protocol: Protocol, work: Path, cells: int = 10_000) -> None:
    """Finish cells until none is left, or as many as asked for."""
    done: dict[str, dict[str, Any]] = {}
    while len(done) < cells:
        known = {cell.name: cell for stage in stages(protocol, done) for cell in stage.cells if cell.name not in done}
        if not known:
            return
        for name, cell in list(known.items())[: cells - len(done)]:
            done[name] = record(cell)
            write_json(work / "cells" / f"{name}.json", done[name])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the three files of a finished benchmark, its cells removed."""
    work, output = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("output")
    fill(PROTOCOL, work)
    for gold in PROTOCOL.golds:
        policies = {name: {"gold": 0.1, "kl": 0.0, "length": 13.0} for name in ("SFT", "DPO")}
        names = ("reward_model_accuracy", "dpo_accuracy", "score_gold_correlation", "token_reward_rank_correlation")
        for seed in range(8):
            measured = {"gold": gold, "seed": seed, **dict.fromkeys(names, 0.4), "policies": policies, "seconds": {}}
            write_json(work / "prepared" / f"seed{seed}" / gold / "measured.json", measured)
    write_report(PROTOCOL, work, output)
    shutil.rmtree(work)
    return output


def test_the_kept_file_is_small_and_whole(finished: Path) -> None:
    kept = finished / "sample_efficiency.json"
    assert kept.stat().st_size < 400_000
    document = read_json(kept)
    assert document["missing"] == 0
    for gold in document["golds"].values():
        assert [len(method["runs"]) for method in gold["methods"].values()] == [5] * len(FULL.methods)
        assert {len(method["tried"]) for method in gold["methods"].values()} == {4}
    assert len(document["sweep"]) == 12 and {len(row["runs"]) for row in document["sweep"]} == {3}


def test_table_and_figure_come_from_the_kept_file_alone(finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "sample_efficiency.json", tmp_path)
    write_report(PROTOCOL, tmp_path / "no_cells", tmp_path)
    for name in ("sample_efficiency.json", "sample_efficiency.md", "sample_efficiency.png"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes(), name
    assert (tmp_path / "sample_efficiency.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_says_what_the_curves_do(finished: Path) -> None:
    methods = read_json(finished / "sample_efficiency.json")["golds"]["sum"]["methods"]
    rto, ddpo = methods["rto"]["summary"], methods["ddpo"]["summary"]
    assert rto["reached"] == 5 and 0.4 < rto["share"]["mean"] < 0.65
    assert rto["gold_difference"]["low"] > 1.5
    # At equal KL, RTO has twice PPO's gold reward by construction.
    assert rto["gold_at_kl_difference"]["n"] == 5
    assert rto["gold_at_kl_difference"]["mean"] == pytest.approx(1.85, abs=0.2)
    assert (ddpo["failed"], ddpo["gold"]["n"]) == (1, 4)


def test_failures_are_listed(finished: Path) -> None:
    text = (finished / "sample_efficiency.md").read_text()
    failures = text.split("## Failures")[1]
    assert failures.count("ValueError: probabilities") == 2
    assert "sum, DDPO, chosen, seed 5" in failures and "requirement, DDPO, chosen, seed 5" in failures
    assert "Not finished" not in text


def test_an_unfinished_benchmark_says_so(tmp_path: Path) -> None:
    fill(PROTOCOL, tmp_path, cells=18)
    write_report(PROTOCOL, tmp_path, tmp_path)
    total = sum(stage.size for stage in stages(PROTOCOL, {}))
    # Of the 18 cells of stage A, 3 are PPO's first configuration of stage B too.
    assert f"**Not finished: {total - 18 - 3} runs are missing.**" in (tmp_path / "sample_efficiency.md").read_text()


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="run the benchmark first"):
        write_report(PROTOCOL, tmp_path, tmp_path)


def test_mean_curve_leaves_out_failed_runs_but_no_seed_of_an_iteration() -> None:
    runs: list[dict[str, Any]] = [
        {"error": None, "curves": {"gold": [1.0, 2.0, 3.0]}},
        {"error": None, "curves": {"gold": [3.0, 4.0, None]}},
        {"error": "ValueError", "curves": None},
    ]
    curve = mean_curve(runs, "gold", 1)
    assert [point and (point.mean, point.n) for point in curve] == [(2.0, 2), (3.0, 2), None]


def test_documents_keep_their_content_and_their_lines_are_short_lists(tmp_path: Path) -> None:
    document = {"a": [1.0, 2.5], "b": {"c": [], "d": [{"e": "two  words [x]", "f": [1, 2]}]}, "g": None}
    write_document(tmp_path / "document.json", document)
    text = (tmp_path / "document.json").read_text()
    assert read_json(tmp_path / "document.json") == {
        **document,
        "b": {"c": [], "d": [{"e": "two  words [x]", "f": [1, 2]}]},
    }
    assert '"a": [1.0, 2.5]' in text


def test_formatting() -> None:
    assert number(None) == "–" and number(-0.5, 1, sign=True) == "-0.5" and number(0.25, 2, sign=True) == "+0.25"
    assert bracket({"mean": 0.5, "low": 0.25, "high": 0.75, "n": 5}) == "0.50 (0.25 to 0.75)"
    assert bracket({"mean": 0.5, "low": None, "high": None, "n": 1}) == "0.50"
    assert settings_text({"beta_1": 0.1, "token_reward_clip": 0.0}) == "beta_1 0.1, token_reward_clip off"
    assert settings_text(None) == "not chosen yet"
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert rounded({"a": [1.23456, 3, None, "x"]}) == {"a": [1.235, 3, None, "x"]}
