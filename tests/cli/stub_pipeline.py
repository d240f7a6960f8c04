"""Pipelines of the stub stage and of functions that note that they were called."""

from dataclasses import dataclass
from pathlib import Path

from rto_lightning.cli import main
from rto_lightning.errors import MissingInputError, UserError
from tests.cli.stub_runs import write

calls: list[tuple] = []


@dataclass
class Size:
    width: int = 4
    depth: int = 1


def make_world(output_dir: Path, seed: int, rows: int = 3, rate: float = 0.5, size: Size | None = None) -> None:
    calls.append(("world", seed, rows, rate, size))
    (output_dir / "rows.txt").write_text("\n".join(str(seed + row) for row in range(rows)))


def fail(output_dir: Path, seed: int, how: str = "user") -> None:
    (output_dir / "half").touch()
    if how == "user":
        raise UserError("there is too little data; give more rows.")
    raise RuntimeError("a defect")


def needs_dpo(output_dir: Path, seed: int, source: str) -> None:
    raise MissingInputError("no dpo role.", stage="dpo")


def copy(output_dir: Path, seed: int, source: str, note: str = "") -> None:
    calls.append(("copy", source, note))
    (output_dir / "copied").write_text(Path(source).read_text())


FIT = {
    "model": {"class_path": "tests.cli.stub_stage.StubStage", "init_args": {"backbone": {"model": "m"}}},
    "data": {"class_path": "tests.cli.stub_stage.StubData"},
    "trainer": {
        "max_steps": 2,
        "accelerator": "cpu",
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "num_sanity_val_steps": 0,
    },
}
WORLD = {"name": "world", "run": "tests.cli.stub_pipeline:make_world", "arguments": {"rows": 5}}
SFT = {
    "name": "sft",
    "fit": "sft.yaml",
    "arguments": {"model.backbone.model": "{world}/rows.txt", "model.lr": 0.2},
}
COPY = {
    "name": "copy",
    "run": "tests.cli.stub_pipeline:copy",
    "arguments": {"source": "{sft}/role/role.json", "note": "{{ jinja }}"},
}


def pipeline(*stages: dict, **settings) -> str:
    return write("conf/pipeline.yaml", {"output_dir": "out", "stages": list(stages), **settings})


def run(*args: str) -> int:
    return main(["pipeline", "--config", "conf/pipeline.yaml", *args])


def fails(capsys, *args: str) -> tuple[int, str]:
    status = run(*args)
    err = capsys.readouterr().err
    assert err.startswith("rto-lightning: error: ")
    assert err.count("\n") == 1
    return status, err.removeprefix("rto-lightning: error: ").strip()
