"""A full disk, a damaged checkpoint, a batch system that takes the machine away, and pipelines that are cut off."""

import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import rto_lightning.modules.ppo_update
from rto_lightning.backbone import PolicyBackbone
from rto_lightning.cli import main
from rto_lightning.modules import PreferenceModule, RTOModule, StageModule
from rto_lightning.runs.metrics_file import MetricsFileLogger
from tests.faults.matrix import FaultMatrix
from tests.faults.runs import Fault, at, call_before, fit, result, run_process, stage_config

pytestmark = pytest.mark.slow


def no_room(bytes_left: int) -> None:
    """From now on no file of this process can grow beyond so many bytes, as if the disk were full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, resource.RLIM_INFINITY))


FULL: dict[str, Fault] = {
    "in the first checkpoint": call_before(torch, "save", 1, lambda: no_room(20_000)),
    "in a later checkpoint": call_before(torch, "save", 3, lambda: no_room(20_000)),
    "in the role": call_before(PolicyBackbone, "save_role", 1, lambda: no_room(5_000)),
    "in the metrics": call_before(MetricsFileLogger, "log_metrics", 4, lambda: no_room(1_000)),
}


@pytest.mark.parametrize("where", FULL)
def test_a_full_disk(where: str, whole: Any, faults: FaultMatrix, tmp_path: Path) -> None:
    config, expected = whole("rto")
    with faults.tried("resume", f"rto: the disk is full {where}"):
        root, log = tmp_path / "run", tmp_path / "run.log"
        assert fit(config, root, fault=FULL[where]) == 1
        told = log.read_text()
        assert "Traceback" not in told
        assert f"{root}/" in told and "could not be written (File too large; " in told
        assert fit(config, root, "--ckpt_path", "last") == 0, log.read_text()
        assert result(root) == expected


def test_a_damaged_checkpoint_with_an_older_one_beside_it(whole: Any, faults: FaultMatrix, tmp_path: Path) -> None:
    config, expected = whole("rto")
    with faults.tried("resume", "rto: the last checkpoint is cut short"):
        root, log = tmp_path / "run", tmp_path / "run.log"
        settings = yaml.safe_load(config.read_text())
        settings["trainer"]["callbacks"][0]["init_args"]["keep"] = 2
        keeping = tmp_path / "keeping.yaml"
        keeping.write_text(yaml.safe_dump(settings))
        fault = at(rto_lightning.modules.ppo_update, "_step", 34)
        assert fit(keeping, root, fault=fault) == -signal.SIGKILL
        last = root / "checkpoints/step=4.ckpt"
        last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
        assert fit(keeping, root, "--ckpt_path", "last") == 1
        assert f"the checkpoint {last} cannot be read (" in log.read_text()
        assert fit(keeping, root, "--ckpt_path", str(root / "checkpoints/step=2.ckpt")) == 0, log.read_text()
        assert result(root) == expected


@pytest.mark.parametrize(("stage", "shorter"), [("rto", "--trainer.max_steps=3"), ("dpo", "--trainer.max_epochs=2")])
def test_a_longer_run_goes_on_from_the_end_of_a_shorter_one(
    stage: str, shorter: str, whole: Any, faults: FaultMatrix, tmp_path: Path
) -> None:
    config, expected = whole(stage)
    with faults.tried("resume", f"{stage}: made longer after its end"):
        root = tmp_path / "run"
        assert fit(config, root, shorter) == 0
        shutil.rmtree(root / "role")
        assert fit(config, root, "--ckpt_path", "last") == 0, (tmp_path / "run.log").read_text()
        assert result(root) == expected


def test_slurm_takes_the_machine_away(whole: Any, faults: FaultMatrix, tmp_path: Path) -> None:
    config, expected = whole("rto")
    with faults.tried("resume", "rto: SIGUSR1 under SLURM"):
        root, log = tmp_path / "run", tmp_path / "run.log"
        scontrol = tmp_path / "scontrol"
        scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/queued\n')
        scontrol.chmod(0o755)

        def under_slurm() -> None:
            os.environ |= {"SLURM_JOB_ID": "71", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
            at(rto_lightning.modules.ppo_update, "_step", 11, signal.SIGUSR1)()

        assert fit(config, root, "--ckpt_path", "last", fault=under_slurm) == 128 + signal.SIGUSR1
        assert (tmp_path / "queued").read_text() == "requeue 71\n"
        assert fit(config, root, "--ckpt_path", "last") == 0, log.read_text()
        assert result(root) == expected


def test_slurm_without_its_commands(whole: Any, faults: FaultMatrix, tmp_path: Path) -> None:
    config, expected = whole("rto")
    with faults.tried("resume", "rto: SIGUSR1 under SLURM in a container"):
        root, log = tmp_path / "run", tmp_path / "run.log"

        def under_slurm() -> None:
            os.environ |= {"SLURM_JOB_ID": "71", "PATH": str(tmp_path)}
            at(rto_lightning.modules.ppo_update, "_step", 11, signal.SIGUSR1)()

        assert fit(config, root, fault=under_slurm) == 128 + signal.SIGUSR1
        told = log.read_text()
        assert "scontrol could not queue the job 71 again" in told and "go on with: rto-lightning fit" in told
        assert fit(config, root, "--ckpt_path", "last") == 0, told
        assert result(root) == expected


def test_a_signal_to_the_run_and_to_the_workers_of_its_loader(whole: Any, faults: FaultMatrix, tmp_path: Path) -> None:
    """As `timeout`, `scancel` and torchrun send it: to every process of the group, and from outside of it."""
    config, expected = whole("reward_model")
    with faults.tried("resume", "reward_model: SIGTERM to the whole group, with workers"):
        root, log = tmp_path / "run", tmp_path / "run.log"

        def signal_the_group() -> None:
            if os.fork() == 0:
                os.killpg(0, signal.SIGTERM)
                os._exit(0)
            os.wait()

        def in_a_group() -> None:
            os.setpgrp()
            call_before(StageModule, "backward", 4, signal_the_group)()

        assert fit(config, root, "--data.num_workers", "2", fault=in_a_group) == 143, log.read_text()
        assert "after step 4, saved as" in log.read_text()
        assert fit(config, root, "--data.num_workers", "2", "--ckpt_path", "last") == 0, log.read_text()
        assert result(root) == expected


CUT: dict[str, tuple[Fault, int]] = {
    "killed in its first stage": (at(PreferenceModule, "training_step", 5), -signal.SIGKILL),
    "killed in its second stage": (at(RTOModule, "rollout", 4), -signal.SIGKILL),
    "killed when the role of its first stage is there": (at(os, "rename", 1, after=True), -signal.SIGKILL),
    "asked to stop in its first stage": (at(PreferenceModule, "training_step", 4, signal.SIGTERM), 143),
}


@pytest.fixture(scope="module")
def pipeline(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A pipeline of DPO and RTO, and what it makes when nothing happens."""
    folder = tmp_path_factory.mktemp("pipeline")
    for stage in ("dpo", "rto"):
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(stage_config(stage, inputs)))
    stages = [{"name": "dpo", "fit": "dpo.yaml"}]
    stages.append({"name": "rto", "fit": "rto.yaml", "arguments": {"model.dpo": "{dpo}/role"}})
    config = folder / "pipeline.yaml"
    config.write_text(yaml.safe_dump({"output_dir": "nowhere", "stages": stages}))
    assert run_pipeline(config, folder / "whole") == 0, (folder / "whole.log").read_text()
    return config, [result(folder / "whole" / stage) for stage in ("dpo", "rto")]


def run_pipeline(config: Path, root: Path, fault: Fault | None = None) -> int:
    arguments = ["pipeline", "--config", str(config), "--output_dir", str(root)]
    return run_process(lambda: main(arguments), fault, root.with_suffix(".log"))


@pytest.mark.parametrize("how", CUT)
def test_a_pipeline_goes_on_within_a_stage(
    how: str, pipeline: tuple[Path, Any], faults: FaultMatrix, tmp_path: Path
) -> None:
    config, expected = pipeline
    fault, status = CUT[how]
    with faults.tried("resume", f"pipeline: {how}"):
        root = tmp_path / "run"
        assert run_pipeline(config, root, fault) == status
        assert run_pipeline(config, root) == 0, (tmp_path / "run.log").read_text()
        assert [result(root / stage) for stage in ("dpo", "rto")] == expected
        assert {path.name for path in root.iterdir()} == {"dpo", "rto", "report.html"}
