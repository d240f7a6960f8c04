"""RTO and PPO of this project, through the LightningModule and the Trainer as a user runs them.

An iteration lasts from the end of one training batch to the end of the next: data loading and Lightning's own work are
in it. There is no logger, no checkpoint and no progress bar.
"""

import time
from functools import partial
from typing import Any

import lightning
import peft
import torch
import transformers
from lightning.pytorch import Callback, LightningModule, Trainer

from rto_lightning.data import PromptBatch, PromptDataModule
from rto_lightning.modules import RTOModule
from rto_lightning.modules.rto_settings import CriticSettings, PPOSettings, RewardSettings
from rto_lightning.rollout import RolloutSettings
from tests.benchmarks.ppo_step_models import backbone_settings
from tests.benchmarks.ppo_step_work import Measured, Work, contend

PHASES = ("rollout", "scoring", "update")


def measure(work: Work, contender: str) -> Measured:
    """Train for `work.steps` iterations.

    Args:
        work: the shapes.
        contender: `rto`; `ppo`, which has beta_1 = 0; `rto_shared`, whose critic is a head on the policy; `rto_reread`,
            which reads the responses as policy though the sampler could keep their log-probabilities.
    """
    optimizer = partial(torch.optim.AdamW, lr=1e-5)
    module = RTOModule(
        backbone_settings(work),
        dpo=str(work.role("dpo")) if contender != "ppo" else None,
        reward=str(work.role("reward")),
        rollout=RolloutSettings(max_new_tokens=work.new_tokens),
        rewards=RewardSettings(beta_1=0.0) if contender == "ppo" else RewardSettings(),
        ppo=PPOSettings(
            microbatch_size=work.microbatch, sampling_logprobs=False if contender == "rto_reread" else None
        ),
        critic=CriticSettings(shared=contender == "rto_shared"),
        policy_optimizer=optimizer,
        critic_optimizer=optimizer,
        seed=0,
    )
    data = PromptDataModule(
        train=str(work.prompts_file), max_prompt_tokens=work.prompt_tokens, batch_size=work.prompts, seed=0
    )
    watch = Watch()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=work.steps,
        callbacks=[watch],
        default_root_dir=work.folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    versions = {package.__name__: package.__version__ for package in (lightning, transformers, peft)}
    trained = sum(weight.numel() for weight in module.parameters() if weight.requires_grad)
    kept = module.last_rollout[0].logprobs is not None
    return {**watch.measured, "versions": versions, "trained_weights": trained, "sampling_logprobs": kept}


class Watch(Callback):
    """Times the iterations and counts their tokens."""

    def __init__(self) -> None:
        self.measured: Measured = {
            "seconds": [],
            "phases": {phase: [] for phase in PHASES},
            "prompt_tokens": [],
            "sampled_tokens": [],
        }
        self._last = 0.0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """The first iteration begins."""
        self._last = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """An iteration ends."""
        now, metrics = time.perf_counter(), trainer.callback_metrics
        self.measured["seconds"].append(now - self._last)
        for phase in PHASES:
            self.measured["phases"][phase].append(float(metrics[f"train/seconds/{phase}"]))
        self.measured["prompt_tokens"].append(int(batch.attention_mask.sum()))
        self.measured["sampled_tokens"].append(round(float(metrics["train/response/length"]) * len(batch)))
        self._last = time.perf_counter()


if __name__ == "__main__":
    contend(measure)
