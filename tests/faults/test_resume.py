"""A run that is killed, at any moment, goes on by `--ckpt_path last` and ends as one that never was.

Compared are the last checkpoint (weights, optimizers, schedules, loops), the role's files and every row of metrics.csv,
of which one says which tokens were sampled, all bit by bit.
"""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

import rto_lightning.callbacks.save_checkpoints
import rto_lightning.modules.ppo_update
import rto_lightning.modules.rto
from rto_lightning.backbone import PolicyBackbone
from rto_lightning.cli.run_files import SaveRunConfig
from rto_lightning.modules import PreferenceModule, RewardModelModule, RTOModule, SFTModule, StageModule
from rto_lightning.modules.reading import TrajectoryReader
from rto_lightning.rollout import TransformersEngine
from rto_lightning.rollout.sampling import SeededSampling
from tests.faults.matrix import FaultMatrix
from tests.faults.runs import Fault, after_seconds, at, fit, half_a_row, half_written, result

pytestmark = pytest.mark.slow

STAGES = {"sft": SFTModule, "dpo": PreferenceModule, "reward_model": RewardModelModule, "rto": RTOModule}
checkpointing = rto_lightning.callbacks.save_checkpoints
ppo_update = rto_lightning.modules.ppo_update

# Kill points: where, and the fault. Each counts as one.
KILLS: dict[str, dict[str, Fault]] = {
    "sft": {
        "while the settings are saved": at(SaveRunConfig, "save_config"),
        "before the first forward pass": at(SFTModule, "training_step"),
        "while gradients are accumulated": at(SFTModule, "training_step", 6),
        "in a backward pass": at(StageModule, "backward", 7),
        "when the optimizer has moved the weights": at(torch.optim.AdamW, "step", 3, after=True),
        "half of the first checkpoint is written": half_written(1),
        "half of a later checkpoint is written": half_written(2),
        "half of a row of metrics is written": half_a_row(4),
        "a checkpoint is in its place, the link to it not": at(checkpointing, "link_to", 2),
    },
    "dpo": {
        "before the first batch": at(PreferenceModule, "training_step"),
        "in the second epoch": at(PreferenceModule, "training_step", 5),
        "in a validation at the end of an epoch": at(PreferenceModule, "validation_step", 3),
        "the older checkpoint is not yet removed": at(SingleDeviceStrategy, "remove_checkpoint"),
        "when training has ended": at(PreferenceModule, "on_train_end"),
        "the role is half written": at(PolicyBackbone, "save_role"),
        "the role is written, but not in its place": at(PolicyBackbone, "save_role", after=True),
    },
    "reward_model": {
        "in a training step": at(RewardModelModule, "training_step", 4),
        "in a validation": at(RewardModelModule, "validation_step", 2),
        "the last checkpoint is half written": half_written(4),
        "while the scores are measured at the end": at(RewardModelModule, "_score_reference_answers", 2),
    },
    "rto": {
        "while the statistics of the scores are measured": at(TransformersEngine, "rollout"),
        "in the first rollout": at(TransformersEngine, "rollout", 3),
        "between two tokens of a rollout": at(SeededSampling, "__call__", 40),
        "in a later rollout": at(TransformersEngine, "rollout", 6),
        "in the scoring": at(TrajectoryReader, "logprobs", 9),
        "before the first step of the policy": at(ppo_update, "accumulate_policy_gradients"),
        "between the steps of policy and critic": at(ppo_update, "accumulate_value_gradients", 6),
        "in the middle of an update": at(ppo_update, "_step", 19),
        "after the last step of an update": at(ppo_update, "_step", 24, after=True),
        "when the moving average is made": at(rto_lightning.modules.rto, "average_policy", 3),
        "before the KL coefficient follows": at(rto_lightning.modules.rto, "adaptive_kl_coefficient", 4),
        "in a validation rollout": at(RTOModule, "validation_step", 2),
        "half of a checkpoint is written": half_written(3),
        "the link to the newest checkpoint is not there": at(checkpointing, "link_to", 3),
        "when the role is to be written": at(PolicyBackbone, "save_role"),
    },
}
TERM, INTERRUPT = signal.SIGTERM, signal.SIGINT
# Signals that ask to stop: the fault, and how many steps must be done in the checkpoint that is saved for it.
STOPS: dict[str, dict[str, tuple[Fault, int | None]]] = {
    "sft": {
        "SIGTERM while gradients are accumulated": (at(SFTModule, "training_step", 5, TERM), 3),
        "Ctrl-C in a backward pass": (at(StageModule, "backward", 4, INTERRUPT), 3),
    },
    "dpo": {
        "SIGTERM in a validation": (at(PreferenceModule, "validation_step", 2, TERM), 2),
        "SIGTERM while a checkpoint is written": (at(torch, "save", 2, TERM), 2),
    },
    "reward_model": {
        "SIGTERM in a training step": (at(RewardModelModule, "training_step", 2, TERM), 2),
        "SIGTERM in the last training step": (at(RewardModelModule, "training_step", 5, TERM), 5),
        "SIGTERM while the scores are measured at the end": (
            at(RewardModelModule, "_score_reference_answers", 1, TERM),
            None,
        ),
    },
    "rto": {
        "SIGTERM before the first step": (at(RTOModule, "on_fit_start", 1, TERM), None),
        "SIGTERM in a rollout, which is abandoned": (at(TransformersEngine, "rollout", 5, TERM), 2),
        "SIGTERM in the scoring, which is abandoned": (at(TrajectoryReader, "logprobs", 10, TERM), 2),
        "SIGTERM in the middle of an update": (at(ppo_update, "_step", 11, TERM), 2),
        "Ctrl-C in the middle of an update": (at(ppo_update, "_step", 26, INTERRUPT), 4),
        "SIGTERM while the role is written": (at(PolicyBackbone, "save_role", 1, TERM), None),
    },
}


def cases(table: dict[str, dict[str, Any]]) -> list[Any]:
    return [pytest.param(stage, name, id=f"{stage}: {name}") for stage, named in table.items() for name in named]


@pytest.mark.parametrize(("stage", "moment"), cases(KILLS))
def test_a_killed_run_ends_as_if_nothing_had_happened(
    stage: str, moment: str, whole: Any, faults: FaultMatrix, tmp_path: Path
) -> None:
    config, expected = whole(stage)
    with faults.tried("resume", f"{stage}: killed {moment}"):
        root = tmp_path / "run"
        assert fit(config, root, "--ckpt_path", "last", fault=KILLS[stage][moment]) == -signal.SIGKILL
        assert fit(config, root, "--ckpt_path", "last") == 0, (tmp_path / "run.log").read_text()
        assert result(root) == expected
        assert not list(root.rglob("*.partial"))


@pytest.mark.parametrize(("stage", "moment"), cases(STOPS))
def test_a_run_that_is_asked_to_stop_saves_and_goes_on(
    stage: str, moment: str, whole: Any, faults: FaultMatrix, tmp_path: Path
) -> None:
    config, expected = whole(stage)
    fault, steps = STOPS[stage][moment]
    with faults.tried("resume", f"{stage}: {moment}"):
        root, log = tmp_path / "run", tmp_path / "run.log"
        status = fit(config, root, fault=fault)
        assert status == 128 + (INTERRUPT if "Ctrl-C" in moment else TERM), log.read_text()
        told = log.read_text()
        assert "Traceback" not in told
        if steps is not None:
            assert f"after step {steps}, saved as {root}/checkpoints/step={steps}.ckpt" in told
            assert "--ckpt_path last" in told
        assert fit(config, root, "--ckpt_path", "last") == 0, log.read_text()
        assert result(root) == expected


@pytest.mark.parametrize("tenths", range(8, 30, 3))
def test_a_run_that_is_killed_again_and_again_ends_all_the_same(
    tenths: int, whole: Any, faults: FaultMatrix, tmp_path: Path
) -> None:
    config, expected = whole("rto")
    with faults.tried("resume", f"rto: killed after {tenths / 10} seconds, and again"):
        root = tmp_path / "run"
        for _ in range(2):
            fit(config, root, "--ckpt_path", "last", fault=after_seconds(tenths / 10))
        assert fit(config, root, "--ckpt_path", "last") == 0, (tmp_path / "run.log").read_text()
        assert result(root) == expected
