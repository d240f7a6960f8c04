"""What is read of a stage's metrics, and as what."""

from pathlib import Path

import pytest

from rto_lightning.report.charts import curve_figure, frontier_figure
from rto_lightning.report.metrics import KINDS, Run, first_and_last, read_run
from tests.report.made import rto_columns, write_stage


def test_values_that_are_no_numbers_are_left_out() -> None:
    run = Run([{"step": "1", "train/loss": "2"}, {"step": "0", "train/loss": "nan"}, {"step": "2", "train/loss": ""}])
    series = run.series("train/loss")
    assert (series.steps, series.values) == ([1.0], [2.0])
    assert len(run.series("train/kl")) == 0


@pytest.mark.parametrize(
    ("columns", "title"),
    [
        (rto_columns(), "RTO and PPO"),
        ({"train/loss": [1.0], "train/reward_chosen": [0.1], "train/accuracy": [0.5]}, "Preferences"),
        ({"train/loss": [1.0], "train/score_chosen": [0.1], "train/accuracy": [0.5]}, "Reward model"),
        ({"train/loss": [1.0], "validation/loss": [0.9]}, "Supervised fine-tuning"),
    ],
)
def test_the_kind_of_a_stage(tmp_path: Path, columns: dict[str, list[float | None]], title: str) -> None:
    run = read_run(write_stage(tmp_path, "stage", columns).folder)
    assert run is not None and run.kind is not None and run.kind.title == title


def test_a_stage_of_another_kind_is_none_of_them(tmp_path: Path) -> None:
    run = read_run(write_stage(tmp_path, "stage", {"train/accuracy": [1.0]}).folder)
    assert run is not None and run.kind is None and KINDS
    assert read_run(tmp_path / "nothing") is None


def test_ends_are_means_over_a_tenth() -> None:
    run = Run([{"step": str(step), "train/loss": str(float(step))} for step in range(40)])
    assert first_and_last(run.series("train/loss")) == (1.5, 37.5)


def test_long_runs_are_drawn_as_means_over_windows() -> None:
    run = Run([{"step": str(step), "train/kl": str(float(step % 2))} for step in range(200)])
    [axes] = curve_figure({"rto": (run.series("train/kl"), run.series("none"))}, "nats").axes
    [line] = axes.lines
    assert len(line.get_xdata()) == 197 and set(line.get_ydata()) == {0.5}
    [axes] = frontier_figure({"": [(0.0, 1.0), (2.0, 3.0)], "b": [(1.0, 1.0)]}, "score").axes
    ends = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines if len(line.get_xdata()) == 1]
    assert ends == [([0.0], [1.0]), ([2.0], [3.0]), *[([1.0], [1.0])] * 3], "one iteration is its own line"
