import csv
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rto_lightning.runs.metrics_file import MetricsFileLogger

NAMES = st.sampled_from(["train/loss", "train/kl", "validation/loss"])
ROWS = st.lists(st.dictionaries(NAMES, st.floats(allow_nan=False, allow_infinity=False), min_size=1), max_size=12)


def read(folder, version="fit"):
    with (folder / version / "metrics.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


@given(ROWS, st.integers(0, 12), st.integers(0, 12))
def test_a_run_that_goes_on_has_each_row_once(tmp_path_factory, rows, died, checkpoint):
    """It logs rows until it dies, and goes on from a checkpoint before that."""
    died = min(died, len(rows))
    checkpoint = min(checkpoint, died)
    folder = tmp_path_factory.mktemp("metrics")
    first = MetricsFileLogger(folder, "fit")
    for step, row in enumerate(rows[:died]):
        first.log_metrics(row, step)
    second = MetricsFileLogger(folder, "fit", resume_at=checkpoint)
    for step, row in enumerate(rows[checkpoint:], start=checkpoint):
        second.log_metrics(row, step)
    if rows[checkpoint:]:
        assert read(folder) == [{**row, "step": step} for step, row in enumerate(rows)]


def test_rows_are_there_at_once(tmp_path):
    logger = MetricsFileLogger(tmp_path, "fit")
    logger.log_metrics({"train/loss": torch.tensor(0.5), "epoch": 0}, 0)
    assert read(tmp_path) == [{"train/loss": 0.5, "epoch": 0, "step": 0}]
    logger.log_metrics({"validation/loss": math.pi}, 0)
    assert read(tmp_path)[1] == {"validation/loss": math.pi, "step": 0}


@pytest.mark.parametrize("torn", ["0,0.25,1", "0,0.25", "0", "1,2,3,4,5"])
def test_half_a_row_is_dropped(tmp_path, torn):
    logger = MetricsFileLogger(tmp_path, "fit")
    logger.log_metrics({"epoch": 0, "a": 1.0, "b": 2.0, "c": 3.0}, 0)
    with (tmp_path / "fit/metrics.csv").open("a") as file:
        file.write(torn)
    again = MetricsFileLogger(tmp_path, "fit", resume_at=1)
    again.log_metrics({"a": 4.0}, 1)
    assert read(tmp_path) == [{"epoch": 0, "a": 1, "b": 2, "c": 3, "step": 0}, {"a": 4, "step": 1}]


def test_a_new_run_begins_the_file_anew(tmp_path):
    MetricsFileLogger(tmp_path, "fit").log_metrics({"a": 1.0}, 0)
    MetricsFileLogger(tmp_path, "fit").log_metrics({"a": 2.0}, 0)
    assert read(tmp_path) == [{"a": 2, "step": 0}]
