"""The paper's configurations hold the paper's numbers (arXiv 2404.18922, appendices D, E and F).

Each stage is parsed and instantiated with its overlays, and the numbers are read off the objects: module, optimizers,
schedules, data module and trainer. No model is loaded; that is left to `test_configs.py`.
"""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.optim import PagedAdamW8bit
from torch.nn import Parameter

from rto_lightning.backbone import RoleCard
from rto_lightning.backbone.roles import STAGE_OF_ROLE
from rto_lightning.cli import main
from rto_lightning.cli.lightning_cli import RTOCLI
from tests.config_files import ROOT

LLAMA, PYTHIA = ROOT / "configs/llama3_8b", ROOT / "configs/tldr_pythia_2.8b"
QLORA, METHODS, PRECISIONS = LLAMA / "qlora_24gb", ROOT / "configs/method", ROOT / "configs/precision"
PAIRS = 61_135
"""Rows of HuggingFaceH4/ultrafeedback_binarized:train_prefs."""
PROMPTS = 60_000
"""What weqweasdas/ultra_train is assumed to hold."""
ADAM = {"class": torch.optim.Adam, "betas": (0.9, 0.95), "weight_decay": 0}
TORCH_ADAM = {"class": torch.optim.Adam, "betas": (0.9, 0.999), "weight_decay": 0}
TORCH_ADAMW = {"class": torch.optim.AdamW, "betas": (0.9, 0.999), "weight_decay": 0.01}


@pytest.fixture
def load(tmp_path: Path, monkeypatch):
    """Instantiates what files say, in a folder where every role exists that one of them names."""
    monkeypatch.chdir(tmp_path)
    for folder in (LLAMA.name, f"{LLAMA.name}/{QLORA.name}", PYTHIA.name):
        for role, stage in STAGE_OF_ROLE.items():
            saved = tmp_path / "outputs" / folder / stage / "role"
            saved.mkdir(parents=True)
            RoleCard(role, "model", "", None, "", "").write(saved)
    fit = {"fit": RTOCLI.subcommands()["fit"]}  # the other commands' parsers would take a third of the time
    monkeypatch.setattr(RTOCLI, "subcommands", staticmethod(lambda: fit))
    seen: list[RTOCLI] = []
    monkeypatch.setattr(RTOCLI, "_run_subcommand", lambda self, command: seen.append(self))

    def load(*files: Path) -> RTOCLI:
        configs = [f"--config={file}" for file in files]
        folder = f"--trainer.default_root_dir={tmp_path / 'out'}"  # the named one may hold a role
        assert main(["fit", *configs, "--trainer.accelerator=cpu", folder]) == 0
        return seen[-1]

    return load


def built(make: Any, learning_rate: float) -> dict[str, Any]:
    """What an optimizer is, once it is built; its learning rate is asserted."""
    optimizer = make([Parameter(torch.zeros(1))])
    (group,) = optimizer.param_groups
    assert group["lr"] == learning_rate
    return {"class": type(optimizer), "betas": group["betas"], "weight_decay": group["weight_decay"]}


def assert_cosine(make: Any, total_steps: int) -> None:
    """3% warm-up, the highest learning rate, a descent to 10% of it at `total_steps`, and no further change."""
    optimizer = torch.optim.SGD([Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    rates = []
    for _ in range(total_steps + 3):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    warmup = round(0.03 * total_steps)
    assert rates[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    descent = rates[warmup : total_steps + 1]
    assert descent[0] == pytest.approx(1.0)
    assert all(later < earlier for earlier, later in pairwise(descent))
    assert rates[total_steps:] == pytest.approx([0.1] * 3)


def assert_limits(cli: RTOCLI, prompt: int, response: int) -> None:
    """The longest prompt and response, in data or rollouts."""
    assert cli.datamodule.max_prompt_tokens == prompt
    if hasattr(cli.datamodule, "max_response_tokens"):
        assert cli.datamodule.max_response_tokens == response
    else:
        assert cli.model.rollout_settings.max_new_tokens == response


def assert_full_training(cli: RTOCLI) -> None:
    """Every weight is trained, in float32, and computes in bfloat16."""
    settings = cli.model.settings
    assert settings.mode == "full" and settings.trained_dtype == torch.float32
    assert cli.trainer.precision == "bf16-mixed"


def with_method(stage: Path, method: str | None) -> list[Path]:
    """A stage, the overlay of a method, and what the paper says of that method on this model."""
    values = stage.parent / f"method/{method}.yaml"
    return [stage] if method is None else [stage, METHODS / f"{method}.yaml", *([values] if values.exists() else [])]


PREFERENCES = {
    None: {"loss": "dpo", "beta": 0.1, "label_smoothing": 0.0},
    "rdpo": {"loss": "rdpo", "beta": 0.1, "length_coefficient": 0.001},
    "simpo": {"loss": "simpo", "beta": 2.5, "margin": 0.5},
    "tdpo2": {"loss": "tdpo2", "beta": 0.1, "kl_coefficient": 0.2},
}


@pytest.mark.parametrize("method", PREFERENCES)
def test_preference_learning(method: str | None, load) -> None:
    cli = load(*with_method(LLAMA / "dpo.yaml", method))
    assert {key: getattr(cli.model, key) for key in PREFERENCES[method]} == PREFERENCES[method]
    assert built(cli.model.optimizer, 5e-7) == ADAM
    batch = cli.datamodule.batch_size * cli.trainer.accumulate_grad_batches
    assert (batch, cli.trainer.max_epochs) == (256, 1)
    assert_cosine(cli.model.lr_scheduler, math.ceil(PAIRS / batch))
    assert_limits(cli, 1024, 1024)
    assert_full_training(cli)


def test_reward_model(load) -> None:
    cli = load(LLAMA / "reward_model.yaml")
    assert built(cli.model.optimizer, 1e-6) == ADAM
    batch = cli.datamodule.batch_size * cli.trainer.accumulate_grad_batches
    assert (batch, cli.trainer.max_epochs) == (128, 1)
    assert_cosine(cli.model.lr_scheduler, math.ceil(PAIRS / batch))
    assert_limits(cli, 1024, 1024)
    assert cli.model.score_statistics.max_new_tokens == 1024
    assert_full_training(cli)


RL = {
    None: (0.05, "token", "gae", 5e-7),
    "ppo": (0.0, "token", "gae", 8e-7),
    "semi_rto": (0.05, "sentence", "gae", 5e-7),
    "ddpo": (0.05, "delayed", "gae", 5e-7),
    "rs_ppo": (0.05, "shaping", "gae", 5e-7),
    "reinforce_pp": (0.0, "token", "reinforce++", 5e-7),
    "rto_reinforce_pp": (0.05, "token", "reinforce++", 5e-7),
}
"""beta_1, granularity, estimator and the policy's learning rate; everything else is the same."""


@pytest.mark.parametrize("method", RL)
def test_reinforcement_learning(method: str | None, load) -> None:
    cli = load(*with_method(LLAMA / "rto.yaml", method))
    beta_1, granularity, estimator, learning_rate = RL[method]
    rewards, ppo = cli.model.rewards, cli.model.ppo
    assert (rewards.beta_1, rewards.granularity) == (beta_1, granularity)
    assert (rewards.beta_2, rewards.beta_3, rewards.kl_target) == (0.01, 1.0, None)
    assert (rewards.token_reward_clip, rewards.score_clip, rewards.normalize_score) == (0.05, 10.0, True)
    assert (cli.model.dpo is None) == (beta_1 == 0)
    assert (ppo.estimator, ppo.gamma, ppo.lam, ppo.clip_range, ppo.whitens) == (estimator, 1.0, 0.95, 0.2, True)
    assert (ppo.epochs, ppo.minibatch_size, cli.datamodule.batch_size) == (1, 128, 1024)
    assert (cli.model.rollout_settings.temperature, cli.model.rollout_settings.responses_per_prompt) == (1.0, 1)
    assert [source.reward for source in cli.model.sources] == ["outputs/llama3_8b/reward_model/role"]
    assert cli.model.critic.init == "reward"
    assert built(cli.model.optimizer, learning_rate) == ADAM
    assert built(cli.model.critic_optimizer, 9e-6) == ADAM
    for schedule in (cli.model.lr_scheduler, cli.model.critic_scheduler):
        assert_cosine(schedule, PROMPTS // 1024)
    assert cli.trainer.max_epochs == 1
    assert_limits(cli, 1024, 1024)
    assert_full_training(cli)


@pytest.mark.parametrize("stage", ["dpo", "reward_model", "rto"])
def test_lora_overlays_every_stage(stage: str, load) -> None:
    cli = load(LLAMA / f"{stage}.yaml", PRECISIONS / "lora_bf16.yaml")
    assert (cli.model.settings.mode, cli.model.settings.lora.rank) == ("adapters", 16)
    assert cli.model.settings.model == "OpenRLHF/Llama-3-8b-sft-mixture"  # what the file says is kept


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_qlora_holds_every_stage_on_one_small_gpu(load) -> None:
    nf4 = PRECISIONS / "qlora_nf4.yaml"
    names = ("dpo.yaml", "reward_model.yaml", "rto.yaml")
    dpo, reward_model, rto = (load(LLAMA / name, nf4, QLORA / name) for name in names)
    for cli in (dpo, reward_model, rto):
        settings = cli.model.settings
        assert (settings.model, settings.mode, settings.quantization) == (
            "OpenRLHF/Llama-3-8b-sft-mixture", "adapters", "nf4",
        )  # fmt: skip
        assert (settings.gradient_checkpointing, settings.lora.rank, settings.lora.alpha) == (True, 16, 32)
        assert settings.lora == dpo.model.settings.lora and cli.trainer.precision == "bf16-mixed"
        assert_limits(cli, 1024, 1024)
    paged = {"class": PagedAdamW8bit, "betas": (0.9, 0.95), "weight_decay": 0}
    assert built(dpo.model.optimizer, 5e-5) == built(reward_model.model.optimizer, 1e-4) == paged
    assert built(rto.model.optimizer, 5e-5) == built(rto.model.critic_optimizer, 1e-4) == paged
    for cli in (dpo, reward_model):
        batch = cli.datamodule.batch_size * cli.trainer.accumulate_grad_batches
        assert (cli.datamodule.batch_size, batch, cli.datamodule.max_train_rows) == (1, 64, 20_000)
        assert_cosine(cli.model.lr_scheduler, math.ceil(20_000 / batch))
    assert reward_model.model.score_statistics.samples == 0 and rto.model.rewards.normalize_score
    assert rto.datamodule.batch_size % rto.model.ppo.minibatch_size == 0
    assert (rto.model.rollout_settings.batch_size, rto.model.ppo.microbatch_size) == (32, 2)
    for schedule in (rto.model.lr_scheduler, rto.model.critic_scheduler):
        assert_cosine(schedule, rto.trainer.max_steps)
    assert rto.model.dpo == "outputs/llama3_8b/qlora_24gb/dpo/role"
    assert [source.reward for source in rto.model.sources] == ["outputs/llama3_8b/qlora_24gb/reward_model/role"]
    paper = load(LLAMA / "rto.yaml").model
    assert (rto.model.rewards, rto.model.critic) == (paper.rewards, paper.critic)
    assert rto.model.ppo.clip_range == paper.ppo.clip_range


def test_summarization_without_a_reward_model(load) -> None:
    sft, dpo, rto = (load(PYTHIA / f"{name}.yaml") for name in ("sft", "dpo", "rto"))
    assert built(sft.model.optimizer, 1e-5) == built(dpo.model.optimizer, 5e-6) == TORCH_ADAMW
    assert (dpo.model.loss, dpo.model.beta) == ("dpo", 0.1)
    for cli in (sft, dpo):
        assert (cli.datamodule.batch_size * cli.trainer.accumulate_grad_batches, cli.trainer.max_epochs) == (32, 1)
    rewards, ppo = rto.model.rewards, rto.model.ppo
    assert (rewards.beta_1, rewards.beta_2, rewards.beta_3, rewards.token_reward_clip) == (0.1, 0.05, 0.0, 0.0)
    assert (rto.model.sources, rto.model.critic.init) == ([], "policy")
    assert (rto.datamodule.batch_size, ppo.minibatch_size, ppo.epochs, rto.trainer.max_steps) == (256, 16, 2, 240)
    assert built(rto.model.optimizer, 3e-6) == built(rto.model.critic_optimizer, 3e-6) == TORCH_ADAM
    for cli in (sft, dpo, rto):
        assert cli.model.settings.chat_template == "plain"
        assert_limits(cli, 448, 64)  # together the paper's 512
        assert_full_training(cli)


def test_baselines_of_summarization(load) -> None:
    reward_model, ppo = load(PYTHIA / "reward_model.yaml"), load(*with_method(PYTHIA / "rto.yaml", "ppo"))
    assert built(reward_model.model.optimizer, 3e-6) == TORCH_ADAMW
    assert reward_model.datamodule.batch_size * reward_model.trainer.accumulate_grad_batches == 128
    rewards = ppo.model.rewards
    assert (rewards.beta_1, rewards.beta_2, rewards.beta_3, ppo.model.dpo) == (0.0, 0.03, 1.0, None)
    assert built(ppo.model.optimizer, 3e-6) == TORCH_ADAM
    assert (ppo.model.critic.init, len(ppo.model.sources)) == ("reward", 1)
    rewards = load(*with_method(PYTHIA / "rto.yaml", "ddpo")).model.rewards
    assert (rewards.beta_1, rewards.beta_2, rewards.granularity) == (0.1, 0.05, "delayed")
