"""Runs of every stage by the command line, in processes that die where a test wants them to.

A run is a fork of the test's process, which has imported everything: starting anew would take ten times as long.
"""

import csv
import functools
import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from rto_lightning.cli import main
from rto_lightning.modules import ppo_update
from rto_lightning.runs.folder import last_checkpoint
from rto_lightning.runs.metrics_file import MetricsFileLogger

Fault = Callable[[], None]
STEPS = 5
TIMED = tuple(f"{split}/{name}" for split in ("train", "validation") for name in ("seconds/", "samples_per_second"))
"""How the names of metrics begin that two runs never have in common."""

ADAM = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
SCHEDULE = {"class_path": "torch.optim.lr_scheduler.LinearLR", "init_args": {"start_factor": 0.5, "total_iters": 4}}


class SampleChecksum(Callback):
    """Logs a number that follows from every token of an iteration's responses."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """After each iteration."""
        ids = pl_module.last_rollout[0].sequences.input_ids
        weights = torch.arange(1, ids.numel() + 1).view(ids.shape)
        pl_module.log("train/sample_checksum", (ids * weights).sum().double())


class SignalToOneRank(Callback):
    """Sends a signal to one of several processes in the middle of an update, once in all runs.

    Args:
        rank: which of them.
        number: the signal.
        call: which optimizer step of all roles, from 1.
        sent: a file that says that it was sent.
    """

    def __init__(self, rank: int, number: int, call: int, sent: str) -> None:
        self.rank, self.number, self.call, self.sent = rank, number, call, Path(sent)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prepares it."""
        if trainer.global_rank == self.rank and not self.sent.exists():
            self.sent.touch()
            at(ppo_update, "_step", self.call, self.number)()


def stage_config(stage: str, inputs: dict[str, str]) -> dict[str, Any]:
    """Settings of a stage with everything that a checkpoint has to hold; `inputs` as of the fixture."""
    checkpoints = {"class_path": "SaveCheckpoints", "init_args": {"every_minutes": None, "every_n_train_steps": 2}}
    trainer: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": STEPS,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "limit_val_batches": 2,
        "callbacks": [checkpoints],
    }
    lora = {"rank": 4, "alpha": 8}
    model: dict[str, Any] = {"backbone": {"model": inputs["model"], "lora": lora}, "optimizer": ADAM}
    model["lr_scheduler"] = SCHEDULE
    data = {"train": inputs["rows"], "validation": inputs["rows"], "batch_size": 4, "eval_batch_size": 4}
    kinds = {"sft": ("SFTModule", "DemonstrationDataModule"), "dpo": ("PreferenceModule", "PreferenceDataModule")}
    kinds |= {"reward_model": ("RewardModelModule", "PreferenceDataModule"), "rto": ("RTOModule", "PromptDataModule")}
    if stage == "sft":
        data |= {"streaming": True, "shuffle_buffer_rows": 5}
        trainer |= {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "val_check_interval": 4}
    if stage == "dpo":  # 3 epochs of 2 steps, validated at their ends
        trainer |= {"max_steps": -1, "max_epochs": 3, "val_check_interval": 1.0, "check_val_every_n_epoch": 1}
        trainer |= {"accumulate_grad_batches": 2}
    if stage == "reward_model":
        model["score_statistics"] = {"samples": 8, "max_new_tokens": 6}
    if stage == "rto":
        del model["optimizer"], model["lr_scheduler"]
        model |= {f"{role}_optimizer": ADAM for role in ("policy", "critic")}
        model |= {f"{role}_scheduler": SCHEDULE for role in ("policy", "critic")}
        model |= {"dpo": inputs["dpo"], "reward": inputs["reward"], "ema_decay": 0.5}
        model |= {"more_rewards": [{"reward_function": "tests.faults.runs:noisy_length"}]}
        model["rewards"] = {"kl_target": 1.0, "kl_horizon": 40, "normalization_samples": 8}
        model["rollout"] = {"max_new_tokens": 6}
        model["ppo"] = {"epochs": 2, "minibatch_size": 2, "microbatch_size": 1}
        trainer["callbacks"] = [checkpoints, {"class_path": "tests.faults.runs.SampleChecksum"}]
    module, data_module = kinds[stage]
    return {
        "trainer": trainer,
        "model": {"class_path": module, "init_args": model},
        "data": {"class_path": data_module, "init_args": data},
    }


def noisy_length(prompts: list[Any], responses: list[str]) -> list[float]:
    """A reward that draws from a global generator."""
    return [
        len(response) + float(noise) for response, noise in zip(responses, torch.randn(len(responses)), strict=True)
    ]


def write_config(folder: Path, stage: str, inputs: dict[str, str]) -> Path:
    """The settings as a file, with the stage's name."""
    path = folder / f"{stage}.yaml"
    path.write_text(yaml.safe_dump(stage_config(stage, inputs)))
    return path


def fit(config: Path, root: Path, *options: str, fault: Fault | None = None, log: Path | None = None) -> int:
    """Runs `rto-lightning fit` in a process of its own.

    Args:
        config: file of the stage.
        root: the stage's folder.
        options: further ones.
        fault: is called in that process before the run, to prepare what will happen to it.
        log: where its output goes.

    Returns:
        The exit status, negative for a signal that has ended it.
    """
    arguments = ["fit", "--config", str(config), "--trainer.default_root_dir", str(root), *options]
    return run_process(lambda: main(arguments), fault, log or root.with_suffix(".log"))


def run_process(work: Callable[[], int], fault: Fault | None, log: Path) -> int:
    """Runs a function in a fork of this process; see `fit`."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 99
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
            sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
            torch.set_num_threads(1)
            if fault is not None:
                fault()
            status = work()
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, result = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(result)


def at(owner: Any, name: str, call: int = 1, number: int = signal.SIGKILL, after: bool = False) -> Fault:
    """A fault: the process gets a signal at a certain call of a function.

    Args:
        owner: class or module that has the function.
        name: of the function.
        call: which call of it, from 1.
        number: the signal.
        after: at the end of that call rather than at its start.
    """

    return call_before(owner, name, call, lambda: send(number), after)


def call_before(owner: Any, name: str, call: int, action: Callable[[], None], after: bool = False) -> Fault:
    """A fault: something happens in the process at a certain call of a function; the arguments are those of `at`."""

    def prepare() -> None:
        plain, count = getattr(owner, name), 0

        @functools.wraps(plain)
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            mine = count == call
            if mine and not after:
                action()
            result = plain(*args, **kwargs)
            if mine and after:
                action()
            return result

        setattr(owner, name, counted)

    return prepare


def send(number: int) -> None:
    """Sends this process a signal and lets its handler run."""
    os.kill(os.getpid(), number)


def half_written(call: int) -> Fault:
    """A fault: the process dies when half of a checkpoint is on the disk; the call counts checkpoints from 1."""

    def prepare() -> None:
        plain, count = torch.save, 0

        def save(contents: Any, file: Any, *args: Any, **settings: Any) -> None:
            nonlocal count
            count += 1
            plain(contents, file, *args, **settings)
            if count == call:
                file.truncate(file.tell() // 2)
                file.flush()
                send(signal.SIGKILL)

        torch.save = save

    return prepare


def half_a_row(call: int) -> Fault:
    """A fault: the process dies when half a row of metrics.csv is written; the call counts rows from 1."""

    def prepare() -> None:
        plain, count = MetricsFileLogger.log_metrics, 0

        def log_metrics(self: MetricsFileLogger, *args: Any, **settings: Any) -> None:
            nonlocal count
            count += 1
            if count == call:
                with self.path.open("a") as file:
                    file.write("0,0.25,1")
                send(signal.SIGKILL)
            plain(self, *args, **settings)

        MetricsFileLogger.log_metrics = log_metrics  # type: ignore[method-assign]

    return prepare


def after_seconds(seconds: float, number: int = signal.SIGKILL) -> Fault:
    """A fault: the process gets a signal at a moment that nothing in it has chosen."""

    def prepare() -> None:
        watched = os.getpid()
        if os.fork() == 0:
            time.sleep(seconds)
            try:
                os.kill(watched, number)
            finally:
                os._exit(0)

    return prepare


def result(root: Path) -> dict[str, Any]:
    """What a finished run has made: hashes of all tensors of its last checkpoint, its role's files, its metrics."""
    last = last_checkpoint(root)
    assert last is not None, f"{root} has no checkpoint"
    checkpoint = torch.load(last, weights_only=True)
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step", "epoch")
    tensors = {key: _hashed(checkpoint[key]) for key in kept}
    role = {path.name: _sha(path.read_bytes()) for path in sorted((root / "role").iterdir()) if path.suffix != ".md"}
    return {"checkpoint": tensors, "role": role, "metrics": metrics(root)}


def metrics(root: Path) -> list[dict[str, str]]:
    """The rows of the run's metrics.csv without what was timed."""
    files = sorted(root.glob("metrics/*/metrics.csv"))
    assert len(files) == 1, f"{root} has metrics of {len(files)} runs"
    with files[0].open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if value and not name.startswith(TIMED)} for row in rows]


def _hashed(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _sha(
            value.contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else str(value.item()).encode()
        )
    if isinstance(value, dict):
        return {str(key): _hashed(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_hashed(item) for item in value]
    return value


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
