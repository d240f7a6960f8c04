"""One cell: train a method with one configuration from one seed, and measure it."""

import gc
import shutil
import subprocess
import time
import traceback
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from rto_lightning.cli.config_errors import ConfigurationError
from rto_lightning.cli.stage import run_stage
from rto_lightning.quickstart.policies import load_policies
from tests.benchmarks.plan import Cell
from tests.benchmarks.preparation import Preparation, evaluation_means, stage_arguments
from tests.benchmarks.protocol import CONFIGS, Protocol
from tests.benchmarks.records import finite, read_curves

OPTIONS = {
    "lr": ("model.policy_optimizer.init_args.lr", "model.critic_optimizer.init_args.lr"),
    "beta_1": ("model.rewards.beta_1",),
    "beta_2": ("model.rewards.beta_2",),
    "token_reward_clip": ("model.rewards.token_reward_clip",),
    "granularity": ("model.rewards.granularity",),
    "estimator": ("model.ppo.estimator",),
    "lam": ("model.ppo.lam",),
    "gamma": ("model.ppo.gamma",),
    "clip_range": ("model.ppo.clip_range",),
    "responses_per_prompt": ("model.rollout.responses_per_prompt",),
}
"""Short names of settings and the options of the command that they set."""


def online_arguments(cell: Cell, protocol: Protocol, prepared: Preparation, folder: Path) -> list[str]:
    """The command of a cell that learns from its own responses."""
    gold = {"class_path": "rto_lightning.quickstart.stages.GoldReward", "init_args": {"gold": cell.gold}}
    options: dict[str, Any] = {
        "model.backbone.model": prepared.sft / "role",
        "model.reward": prepared.reward_model / "role",
        "data.train": prepared.world / "prompts_train.jsonl",
        "data.batch_size": protocol.responses // cell.settings.get("responses_per_prompt", 1),
        "model.ppo.minibatch_size": protocol.minibatch,
        "model.ppo.microbatch_size": protocol.minibatch,
        "trainer.max_steps": cell.iterations,
        "trainer.callbacks": [gold],
    }
    if cell.settings.get("beta_1") != 0:
        options["model.dpo"] = prepared.dpo / "role"
    for name, value in cell.settings.items():
        options |= dict.fromkeys(OPTIONS[name], value)
    return stage_arguments(CONFIGS / "rto.yaml", folder, cell.seed, options)


def preference_arguments(cell: Cell, prepared: Preparation, folder: Path) -> list[str]:
    """The command of a cell that learns from the preferences directly."""
    options = {
        "model.backbone.model": prepared.sft / "role",
        "data.train": prepared.preferences / "train.jsonl",
        "data.validation": prepared.preferences / "validation.jsonl",
        **cell.settings,
    }
    return stage_arguments(CONFIGS / "dpo.yaml", folder, cell.seed, options)


def run_cell(cell: Cell, protocol: Protocol, work: Path) -> dict[str, Any]:
    """Train and measure; a failure is recorded, and its error with it.

    Raises:
        ConfigurationError: for settings that the command does not know, a mistake of the benchmark itself.
    """
    prepared = Preparation(work, cell.gold, cell.seed)
    folder = work / "running" / cell.name
    shutil.rmtree(folder, ignore_errors=True)
    started = time.monotonic()
    record: dict[str, Any] = {
        "gold": cell.gold,
        "seed": cell.seed,
        "method": cell.method,
        "settings": dict(cell.settings),
        "iterations": cell.iterations,
        "commit": commit(),
        "error": None,
        "diverged": False,
    }
    seconds: dict[str, float] = {}
    try:
        if cell.online:
            run_stage(online_arguments(cell, protocol, prepared, folder))
        else:
            run_stage(preference_arguments(cell, prepared, folder))
        seconds["training"] = time.monotonic() - started
        record["curves"] = read_curves(folder) if cell.online else None
        backbone = load_policies(str(prepared.sft / "role"), {"policy": str(folder / "role")})
        for split in ("validation", "test"):
            record[split] = evaluation_means(prepared.evaluate(backbone, "policy", split))
        measured = {name: record[name] for name in ("curves", "validation", "test")}
        record["diverged"] = finite(measured) != measured
    except ConfigurationError:
        raise
    except Exception as error:
        record["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        record["traceback"] = traceback.format_exc()[-3000:]
    seconds["all"] = time.monotonic() - started
    record["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    shutil.rmtree(folder, ignore_errors=True)
    gc.collect()  # reference cycles keep models alive until a collection
    return record


@cache
def commit() -> str | None:
    """The commit of this checkout, with a + if package or configurations were changed since; None without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":/rto_lightning", ":/configs")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def describe(record: Mapping[str, Any]) -> str:
    """A line for the log."""
    if record["error"] is not None:
        return f"FAILED, {record['error']}"
    test = record["test"]
    note = ", DIVERGED" if record["diverged"] else ""
    return f"gold {test['gold']:.2f}, KL {test['kl']:.1f}, length {test['length']:.1f}{note}"
