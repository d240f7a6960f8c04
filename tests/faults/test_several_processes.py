"""Two processes, one of which is killed or asked to stop in the middle of an update."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.faults.matrix import FaultMatrix
from tests.faults.runs import metrics, result, stage_config
from tests.roles import save_random_role

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ROLES = ("dpo", "reward")


def torchrun(config: Path, root: Path) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "rto_lightning"]
    options = ["fit", "--config", str(config), "--trainer.default_root_dir", str(root), "--ckpt_path", "last"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("strategy", "mode", "number"),
    [("ddp", "adapters", signal.SIGTERM), ("fsdp", "full", signal.SIGTERM), ("fsdp", "full", signal.SIGKILL)],
)
def test_one_of_two_processes_gets_a_signal(
    strategy: str, mode: str, number: int, inputs: dict[str, str], faults: FaultMatrix, tmp_path: Path
) -> None:
    with faults.tried("resume", f"rto on two processes, {strategy}: {signal.Signals(number).name} to one of them"):
        if mode == "full":
            roles = {name: save_random_role(Path(inputs["model"]), tmp_path / name, name, mode=mode) for name in ROLES}
            inputs = inputs | roles
        settings = stage_config("rto", inputs)
        settings["trainer"] |= {"strategy": strategy, "devices": 2, "limit_val_batches": 0}
        settings["model"]["init_args"]["backbone"]["mode"] = mode
        settings["trainer"]["callbacks"] = settings["trainer"]["callbacks"][:1]
        whole, config = tmp_path / "whole.yaml", tmp_path / "config.yaml"
        whole.write_text(yaml.safe_dump(settings))
        fault = {"rank": 1, "number": int(number), "call": 18, "sent": str(tmp_path / "sent")}
        settings["trainer"]["callbacks"] += [{"class_path": "tests.faults.runs.SignalToOneRank", "init_args": fault}]
        config.write_text(yaml.safe_dump(settings))
        done = torchrun(whole, tmp_path / "whole")
        assert done.returncode == 0, done.stderr
        stopped = torchrun(config, tmp_path / "run")
        assert stopped.returncode != 0 and (tmp_path / "sent").exists()
        if number == signal.SIGTERM:
            saved = tmp_path / "run/checkpoints/step=3.ckpt"
            assert f"after step 3, saved as {saved}" in stopped.stderr, stopped.stderr
        resumed = torchrun(config, tmp_path / "run")
        assert resumed.returncode == 0, resumed.stderr
        assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
        assert not list((tmp_path / "run").rglob("*.partial"))


def outcome(root: Path) -> Any:
    """As `result`; of a folder of shards, whose files two runs need not have in common, without the checkpoint."""
    if not (root / "checkpoints/last.ckpt").is_dir():
        return result(root)
    role = {path.name: path.read_bytes() for path in (root / "role").iterdir() if path.suffix == ".safetensors"}
    return role, metrics(root)
