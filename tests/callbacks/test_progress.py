import sys

import pytest
from lightning.pytorch import Trainer

from rto_lightning.callbacks import PhaseProgressBar, progress
from tests.cli.stub_stage import StubBackboneSettings, StubData, StubStage


def run(phases: bool, tmp_path, refresh_rate: int = 1, **settings) -> PhaseProgressBar:
    bar = PhaseProgressBar(refresh_rate=refresh_rate)
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[bar],
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_model_summary=False,
        logger=False,
        num_sanity_val_steps=0,
        **{"max_steps": 6, **settings},
    )
    trainer.fit(StubStage(StubBackboneSettings(), phases=phases), datamodule=StubData())
    return bar


@pytest.fixture
def terminal(monkeypatch):
    """Lets the captured output pass for a terminal."""
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)


def test_phases_are_shown_with_iteration_and_speed(tmp_path, capsys, terminal):
    run(True, tmp_path)  # 6 iterations of 4 batches an epoch: the count goes on over epochs
    shown = capsys.readouterr().out
    for phase in ("rollout", "scoring", "update"):
        for iteration in (1, 5, 6):
            assert f"Iteration {iteration}/6 {phase}" in shown
    assert "Iteration 7/6" not in shown
    assert "samples/s=12.3" in shown
    assert "6/6 [" in shown


def test_other_stages_get_the_usual_bar_with_tidy_figures(tmp_path, capsys, terminal):
    run(False, tmp_path)
    shown = capsys.readouterr().out
    assert "Epoch 0" in shown and "Epoch 1" in shown
    assert "Iteration" not in shown
    assert "loss=" in shown and "train/loss" not in shown and "v_num" not in shown


def test_a_file_gets_few_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 1e9)
    run(True, tmp_path, max_steps=40)
    assert capsys.readouterr().out.count("Iteration") < 40


@pytest.mark.parametrize("settings", [{"max_epochs": 2, "max_steps": -1}, {"max_epochs": 3, "max_steps": 8}])
def test_the_total_is_that_of_the_run(tmp_path, capsys, terminal, settings):
    run(True, tmp_path, **settings)
    shown = capsys.readouterr().out
    assert "Iteration 8/8 update" in shown


def test_refresh_rate_zero_hides_the_bar(tmp_path, capsys):
    run(True, tmp_path, refresh_rate=0)
    assert capsys.readouterr().out == ""


def test_figures_keep_their_full_name_where_short_ones_would_clash(monkeypatch):
    bar = PhaseProgressBar()
    metrics = {"loss": 1.0, "train/loss": 2.0, "validation/loss": 3.0, "v_num": 1}
    monkeypatch.setattr(progress.TQDMProgressBar, "get_metrics", lambda self, *_: dict(metrics))
    assert bar.get_metrics(None, None) == {"loss": 1.0, "train/loss": 2.0, "validation/loss": 3.0}
