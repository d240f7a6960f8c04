"""Run a stage in the test's own process, without the command line."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer

from rto_lightning.backbone import BackboneSettings
from rto_lightning.data import DemonstrationDataModule, PreferenceDataModule, PromptBatch, PromptDataModule
from rto_lightning.modules import PreferenceModule, RewardModelModule, RTOModule, SFTModule, StageModule
from rto_lightning.modules.experience import Experience
from rto_lightning.modules.reward_model import ScoreStatisticsSettings
from rto_lightning.modules.rto_settings import CriticSettings, PPOSettings, RewardSettings
from rto_lightning.rollout import RolloutSettings
from tests.models import LORA

LIMITS = {"max_prompt_tokens": 100, "batch_size": 4}


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def trainer(folder: Path, steps: int, **options: Any) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        max_steps=steps,
        accelerator="cpu",
        logger=options.pop("logger", False),
        enable_checkpointing=options.pop("enable_checkpointing", False),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


def settings(model: Path, **changes: Any) -> BackboneSettings:
    return BackboneSettings(str(model), **{"lora": LORA, **changes})


def sft(model: Path, **changes: Any) -> SFTModule:
    return SFTModule(settings(model, **changes), optimizer=adam)


def dpo(
    model: Path, trained: str | None = None, loss: Any = "dpo", options: dict[str, Any] | None = None, **changes: Any
) -> PreferenceModule:
    return PreferenceModule(settings(model, **changes), trained=trained, loss=loss, optimizer=adam, **(options or {}))


def reward_model(model: Path, **changes: Any) -> RewardModelModule:
    statistics = ScoreStatisticsSettings(samples=8, max_new_tokens=6)
    return RewardModelModule(settings(model, **changes), score_statistics=statistics, optimizer=adam)


def demonstrations(files: dict[str, str]) -> LightningDataModule:
    return DemonstrationDataModule(train=files["demonstrations"], test=files["demonstrations"], **LIMITS)


def preferences(files: dict[str, str]) -> LightningDataModule:
    return PreferenceDataModule(train=files["preferences"], test=files["preferences"], **LIMITS)


def prompts(files: dict[str, str]) -> LightningDataModule:
    source = files["prompts"]
    return PromptDataModule(train=source, validation=source, test=source, predict=source, **LIMITS)


def rto(model: Path, **options: Any) -> RTOModule:
    """RTO without DPO, scored by a Python function, unless the options say otherwise; `kind` is the class."""
    backbone, kind = settings(model, **options.pop("backbone", {})), options.pop("kind", RTOModule)
    defaults: dict[str, Any] = {
        "reward_function": "tests.modules.stages:count_exclamations",
        "rollout": RolloutSettings(max_new_tokens=6),
        "rewards": RewardSettings(beta_1=0.0, normalization_samples=8),
        "ppo": PPOSettings(microbatch_size=2),
        "critic": CriticSettings(init="policy"),
        "policy_optimizer": adam,
        "critic_optimizer": adam,
    }
    module: RTOModule = kind(backbone, **{**defaults, **options})
    return module


def full_rto(model: Path, roles: dict[tuple[str, str], str], mode: str = "adapters", **options: Any) -> RTOModule:
    """RTO with every term: token rewards, KL, score, critic from the reward role."""
    defaults: dict[str, Any] = {
        "dpo": roles[mode, "dpo"],
        "reward": roles[mode, "reward"],
        "reward_function": None,
        "rewards": RewardSettings(),
        "critic": CriticSettings(),
        "backbone": {"mode": mode},
    }
    return rto(model, **{**defaults, **options})


def one_batch(module: RTOModule, files: dict[str, str]) -> PromptBatch:
    """The module with its roles loaded, and a batch of prompts, outside of a trainer."""
    module.configure_model()
    data: Any = prompts(files)
    data.chat = module.chat
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def count_exclamations(prompts: list[Any], responses: list[str]) -> list[float]:
    """A reward that a random byte model earns now and then."""
    return [sum(ord(character) % 7 for character in response) / 10 for response in responses]


def fit(module: StageModule, data: LightningDataModule, folder: Path, steps: int = 3, **options: Any) -> StageModule:
    trainer(folder, steps, **options).fit(module, data)
    return module


class Recorder(Callback):
    """Keeps the logged metrics of every training batch."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.metrics.append({name: float(value) for name, value in trainer.logged_metrics.items()})


def recorded_fit(module: RTOModule, files: dict[str, str], folder: Path, steps: int = 2) -> list[dict[str, float]]:
    """Train, and return the logged metrics of each iteration."""
    recorder = Recorder()
    options = {"callbacks": [recorder], "log_every_n_steps": 1, "logger": True}
    fit(module, prompts(files), folder, steps=steps, **options)
    return recorder.metrics


def experience(module: RTOModule, files: dict[str, str]) -> Experience:
    """What `make_experience` makes of a rollout."""
    batch = one_batch(module, files).repeated(module.rollout_settings.responses_per_prompt)
    module.measure_score_statistics([batch])
    return module.make_experience(module.rollout(batch, 0), batch.messages)
