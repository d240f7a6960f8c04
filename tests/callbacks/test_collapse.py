"""A run whose policy has collapsed stops with an error, and goes on counting when it is resumed."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint

from rto_lightning.callbacks import StopOnCollapse
from rto_lightning.cli import main
from rto_lightning.errors import UserError
from tests.modules import conftest, stages

files = conftest.files
HEALTHY = {"kl": 1.0, "entropy": 2.0, "response/length": 20.0, "response/truncated": 0.1}


def iteration(callback: StopOnCollapse, number: int = 1, **figures: float) -> None:
    """Show the callback the metrics of an iteration."""
    metrics = {**HEALTHY, **{name.replace("response_", "response/"): value for name, value in figures.items()}}
    trainer: Any = SimpleNamespace(
        callback_metrics={f"train/{name}": torch.tensor(value) for name, value in metrics.items()}, global_step=number
    )
    callback.on_train_batch_end(trainer)


@pytest.mark.parametrize(
    ("limit", "figures", "says"),
    [
        ({"max_kl": 50}, {"kl": 50.5}, r"train/kl is 50\.5 in iteration 6, beyond max_kl 50 for 1 in a row"),
        ({"min_entropy": 0.1}, {"entropy": 0.01}, r"train/entropy is 0\.01 in iteration 6, beyond min_entropy 0\.1"),
        ({"max_entropy": 3.5}, {"entropy": 3.6}, r"train/entropy is 3\.6 in iteration 6, beyond max_entropy 3\.5"),
        ({"min_response_length": 5}, {"response_length": 1.0}, "train/response/length is 1 .* min_response_length 5"),
        ({"max_response_length": 99}, {"response_length": 100.0}, "length is 100 .* max_response_length 99"),
        ({"max_truncated": 0.9}, {"response_truncated": 1.0}, r"truncated is 1 .* max_truncated 0\.9"),
    ],
)
def test_the_figure_its_value_and_its_limit_are_named(limit, figures, says):
    callback = StopOnCollapse(**limit, patience=1)
    iteration(callback)
    with pytest.raises(UserError, match=f"the policy has collapsed: .*{says}"):
        iteration(callback, number=7, **figures)


@given(st.lists(st.sampled_from([0.0, 2.0, math.nan]), max_size=20), st.integers(1, 4))
def test_it_stops_after_as_many_iterations_in_a_row_as_the_patience(values, patience):
    state, in_a_row = None, 0
    for value in values:
        callback = StopOnCollapse(max_kl=1.0, patience=patience)
        if state is not None:
            callback.load_state_dict(state)  # as in a run that was resumed
        if not math.isnan(value):
            in_a_row = in_a_row + 1 if value > 1 else 0
        if in_a_row == patience:
            with pytest.raises(UserError, match=f"for {patience} in a row"):
                iteration(callback, kl=value)
            return
        iteration(callback, kl=value)
        state = callback.state_dict()


def test_settings_that_stop_nothing_are_refused(tiny_model, files, tmp_path):
    with pytest.raises(UserError, match="has no limit"):
        StopOnCollapse()
    with pytest.raises(UserError, match="patience 0; set it to 1 or more"):
        StopOnCollapse(max_kl=1, patience=0)
    with pytest.raises(UserError, match=r"the sft stage has none; remove it from trainer\.callbacks"):
        callbacks = [StopOnCollapse(max_kl=1)]
        stages.fit(stages.sft(tiny_model), stages.demonstrations(files), tmp_path, callbacks=callbacks)


def test_counts_of_a_run_are_in_its_checkpoint(tiny_model, files, tmp_path):
    """Responses of 6 tokens are beyond a limit of 1 token, once before the checkpoint and once after it."""

    def fit(steps: int, **options: Any) -> None:
        saved = ModelCheckpoint(tmp_path, filename="saved", every_n_train_steps=1, enable_version_counter=False)
        stop = StopOnCollapse(max_response_length=1, patience=2)
        trainer = stages.trainer(tmp_path, steps, enable_checkpointing=True, callbacks=[stop, saved])
        trainer.fit(stages.rto(tiny_model), stages.prompts(files), **options)

    fit(1)
    with pytest.raises(UserError, match=r"in iteration 1, beyond max_response_length 1 for 2 in a row"):
        fit(2, ckpt_path=tmp_path / "saved.ckpt")
    assert torch.load(tmp_path / "saved.ckpt", weights_only=True)["global_step"] == 1


def test_a_file_names_it_and_no_role_is_saved(tiny_model, files, tmp_path, capsys):
    settings = {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 3,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(tmp_path / "out"),
            "callbacks": [{"class_path": "StopOnCollapse", "init_args": {"max_response_length": 1, "patience": 2}}],
        },
        "model": {
            "class_path": "rto_lightning.modules.RTOModule",
            "init_args": {
                "backbone": {"model": str(tiny_model)},
                "rewards": {"beta_1": 0.0, "beta_3": 0.0, "truncation_penalty": 1.0},
                "critic": {"init": "policy"},
                "rollout": {"max_new_tokens": 6},
            },
        },
        "data": {
            "class_path": "rto_lightning.data.PromptDataModule",
            "init_args": {"train": files["prompts"], "batch_size": 4},
        },
    }
    (tmp_path / "rto.yaml").write_text(yaml.safe_dump(settings))
    assert main(["fit", f"--config={tmp_path / 'rto.yaml'}"]) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if "collapsed" in line]
    assert line.startswith("rto-lightning: error: the policy has collapsed: train/response/length is ")
    assert "in iteration 1, beyond max_response_length 1 for 2 in a row" in line
    assert not (tmp_path / "out/role").exists()
