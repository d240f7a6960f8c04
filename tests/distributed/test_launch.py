"""The command that the README documents for several processes, and what happens when one of them dies."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

ROOT = Path(__file__).parents[2]


class Dies(Callback):
    """Ends rank 1 without a word after two steps."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 2:
            (Path(trainer.default_root_dir) / "died").touch()
            os._exit(17)


def write_config(folder: Path, inputs: dict[str, str], **trainer: object) -> Path:
    """RTO of a tiny model by a Python function."""
    config = {
        "seed_everything": 1,
        "trainer": {
            "default_root_dir": str(folder / "run"),
            "accelerator": "cpu",
            "max_steps": 2,
            "num_sanity_val_steps": 0,
            **trainer,
        },
        "model": {
            "class_path": "rto_lightning.modules.RTOModule",
            "init_args": {
                "backbone": {"model": inputs["model"]},
                "reward_function": "tests.modules.stages:count_exclamations",
                "rollout": {"max_new_tokens": 6},
                "rewards": {"beta_1": 0.0, "normalization_samples": 8},
                "critic": {"init": "policy"},
            },
        },
        "data": {
            "class_path": "rto_lightning.data.PromptDataModule",
            "init_args": {"train": inputs["rows"], "batch_size": 8},
        },
    }
    path = folder / "rto.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run(command: list[str], timeout: float = 300) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def documented_command() -> list[str]:
    """The torchrun line of the README for one machine, as a list of words."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^torchrun --standalone .*$", text, re.MULTILINE)
    return line.split()


@pytest.mark.slow
def test_the_documented_command_trains(tmp_path: Path, inputs: dict[str, str]) -> None:
    words = documented_command()
    assert words[0] == "torchrun" and "--config" in words
    processes = words.index("--nproc_per_node") + 1
    words[processes] = "2"
    first, last = (index for index, word in enumerate(words) if word == "--config")
    words[first + 1] = str(write_config(tmp_path, inputs))
    assert (ROOT / words[last + 1]).is_file()
    command = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    refused = run(command)  # on a CPU, `devices: auto` is one
    assert refused.returncode != 0 and "process 1 of this machine has no device" in refused.stderr
    result = run([*command, "--trainer.devices", "2"])
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "run/role/role.json").is_file()
    assert json.loads((tmp_path / "run/memory.json").read_text())["measured_peak"] > 0
    assert not (tmp_path / "run/metrics/fit-2").exists()
    assert len((tmp_path / "run/metrics/fit/metrics.csv").read_text().splitlines()) == 3


@pytest.mark.slow
def test_lightning_starts_the_processes_itself(tmp_path: Path, inputs: dict[str, str]) -> None:
    config = write_config(tmp_path, inputs, strategy="ddp", devices=2)
    result = run([sys.executable, "-m", "rto_lightning", "fit", "--config", str(config)])
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "run/role/role.json").is_file()


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_within_a_minute(tmp_path: Path, inputs: dict[str, str]) -> None:
    config = write_config(tmp_path, inputs, strategy="ddp", devices=2, max_steps=1000)
    settings = yaml.safe_load(config.read_text())
    settings["trainer"]["callbacks"] = [{"class_path": "tests.distributed.test_launch.Dies"}]
    config.write_text(yaml.safe_dump(settings))
    start = time.monotonic()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = run([sys.executable, *torchrun, "-m", "rto_lightning", "fit", "--config", str(config)])
    died = (tmp_path / "run/died").stat().st_mtime
    assert result.returncode != 0
    assert time.time() - died < 60, "the surviving rank was waited for"
    assert time.monotonic() - start < 300
    assert re.search(r"rank\s*:\s*1 ", result.stderr) and "exitcode  : 17" in result.stderr
    assert not (tmp_path / "run/role").exists()
