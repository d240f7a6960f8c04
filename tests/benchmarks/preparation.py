"""What the cells of one (gold reward, seed) share: the world, the SFT model, preferences, DPO and reward model.

World and SFT model depend on the seed only and serve both gold rewards. Each step is made once, in a folder of its own,
and is made anew if it was interrupted.
"""

import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from rto_lightning.backbone import Message, PolicyBackbone
from rto_lightning.cli.stage import run_stage
from rto_lightning.quickstart.gold import GoldName, gold_reward
from rto_lightning.quickstart.jsonl import read_jsonl
from rto_lightning.quickstart.policies import PolicyEvaluation, Sampler, evaluate_policy, load_policies
from rto_lightning.quickstart.stages import make_preferences
from rto_lightning.quickstart.token_rewards import token_reward_correlation
from rto_lightning.quickstart.world import write_world
from rto_lightning.rewards import make_reward_source
from rto_lightning.rollout import response_texts
from tests.benchmarks.protocol import CONFIGS, Protocol
from tests.benchmarks.records import last_metric, read_json, write_json

ANSWERS_PER_PROMPT = 4
MAX_NEW_TOKENS = 36
"""As in configs/quickstart/rto.yaml."""
DONE = "done.json"
MEASURED = "measured.json"


class Preparation:
    """Folders of what one (gold reward, seed) needs.

    Args:
        work: the benchmark's work folder.
        gold: the gold reward.
        seed: of everything.
    """

    def __init__(self, work: Path, gold: GoldName, seed: int) -> None:
        self.gold: GoldName = gold
        self.seed = seed
        self.common = work / "prepared" / f"seed{seed}"
        """What both gold rewards share, and where they are locked."""
        self.own = self.common / gold
        self.world, self.sft = self.common / "world", self.common / "sft"
        self.preferences, self.dpo, self.reward_model = (
            self.own / name for name in ("preferences", "dpo", "reward_model")
        )

    @property
    def done(self) -> bool:
        """Whether all of it is there."""
        return (self.own / MEASURED).exists()

    def prompts(self, split: str) -> list[list[Message]]:
        """The prompts of a split, as messages."""
        return [row["prompt"] for row in read_jsonl(self.world / f"prompts_{split}.jsonl")]

    def make(self, protocol: Protocol) -> None:
        """Make what is missing."""
        more = protocol.preparation
        model = {"model.backbone.model": self.sft / "role"}
        pairs = {f"data.{split}": self.preferences / f"{split}.jsonl" for split in ("train", "validation")}

        def fit(folder: Path, config: str, options: Mapping[str, Any]) -> None:
            run_stage(stage_arguments(CONFIGS / config, folder, self.seed, {**options, **more.get(folder.name, {})}))

        def sft() -> None:
            data = {f"data.{split}": self.world / f"demonstrations_{split}.jsonl" for split in ("train", "validation")}
            fit(self.sft, "sft.yaml", {"model.backbone.model": self.world / "model", **data})

        def preferences() -> None:
            role, prompts = str(self.sft / "role"), str(self.world / "prompts_train.jsonl")
            make_preferences(self.preferences, self.seed, role, prompts, gold=self.gold, **more.get("preferences", {}))

        _step(self.world, lambda: write_world(self.world, self.seed))
        _step(self.sft, sft)
        _step(self.preferences, preferences)
        _step(self.dpo, lambda: fit(self.dpo, "dpo.yaml", {**model, **pairs}))
        _step(self.reward_model, lambda: fit(self.reward_model, "reward_model.yaml", {**model, **pairs}))
        if not self.done:
            write_json(self.own / MEASURED, self.measure())

    def measure(self) -> dict[str, Any]:
        """How good the learned rewards are, and the policies that all methods are compared with."""
        backbone = load_policies(str(self.sft / "role"), {"dpo": str(self.dpo / "role")})
        prompts = self.prompts("test")
        seconds = {
            folder.name: read_json(folder / DONE)["seconds"]
            for folder in (self.world, self.sft, self.preferences, self.dpo, self.reward_model)
        }
        source = make_reward_source(backbone, str(self.reward_model / "role"), None)
        asked = prompts * ANSWERS_PER_PROMPT
        trajectory = Sampler(backbone, "reference", MAX_NEW_TOKENS, self.seed).trajectory(asked)
        with torch.no_grad():
            scores = source.score(asked, trajectory).tolist()
        golds = [
            gold_reward(prompt, text, self.gold)
            for prompt, text in zip(asked, response_texts(trajectory, backbone.chat), strict=True)
        ]
        correlation = None
        if self.gold == "sum":
            correlation = token_reward_correlation(backbone, prompts, ANSWERS_PER_PROMPT, MAX_NEW_TOKENS, self.seed)
        return {
            "gold": self.gold,
            "seed": self.seed,
            "reward_model_accuracy": last_metric(self.reward_model, "validation/accuracy"),
            "dpo_accuracy": last_metric(self.dpo, "validation/accuracy"),
            "score_gold_correlation": statistics.correlation(scores, golds),
            "token_reward_rank_correlation": correlation,
            "policies": {
                name: evaluation_means(self.evaluate(backbone, role, "test"))
                for name, role in (("SFT", "reference"), ("DPO", "dpo"))
            },
            "seconds": seconds,
        }

    def evaluate(self, backbone: PolicyBackbone, role: str, split: str) -> PolicyEvaluation:
        """Answers of a role to the prompts of a split, measured."""
        return evaluate_policy(
            backbone, role, self.prompts(split), ANSWERS_PER_PROMPT, MAX_NEW_TOKENS, self.seed, self.gold
        )


def evaluation_means(evaluation: PolicyEvaluation) -> dict[str, float]:
    """Means over prompts."""
    return {name: statistics.fmean(getattr(evaluation, name)) for name in ("gold", "kl", "length")}


def stage_arguments(config: Path, folder: Path, seed: int, options: Mapping[str, Any]) -> list[str]:
    """Arguments of `run_stage`: no progress bar, no checkpoints, and metrics.csv as the only log."""
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(folder / "metrics"), "name": "", "version": "fit"},
    }
    quiet = dict.fromkeys(("enable_progress_bar", "enable_checkpointing", "enable_model_summary"), False)
    every = {
        "trainer.default_root_dir": folder,
        "seed_everything": seed,
        "trainer.logger": logger,
        **{f"trainer.{name}": value for name, value in quiet.items()},
        **options,
    }
    return ["fit", "--config", str(config), *(f"--{name}={_as_option(value)}" for name, value in every.items())]


def _as_option(value: Any) -> str:
    return str(value) if isinstance(value, str | Path) else json.dumps(value)


def _step(folder: Path, make: Callable[[], None]) -> None:
    """Make a folder, unless it is done."""
    if (folder / DONE).exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started = time.monotonic()
    make()
    write_json(folder / DONE, {"seconds": round(time.monotonic() - started, 1)})
