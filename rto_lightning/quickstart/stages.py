"""The pipeline stages of the quickstart that train nothing: sampling preferences, and the closing report."""

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from rto_lightning.algorithms import kl_estimate, masked_sum, token_rewards
from rto_lightning.backbone import (
    BackboneSettings,
    ChatTokenizer,
    Message,
    PolicyBackbone,
    Sequences,
    load_chat_tokenizer,
)
from rto_lightning.errors import UserError
from rto_lightning.modules import RTOModule
from rto_lightning.quickstart.gold import gold_reward
from rto_lightning.quickstart.jsonl import read_jsonl
from rto_lightning.quickstart.preferences import sample_preferences, write_preferences
from rto_lightning.quickstart.report import (
    over_optimization,
    plot_learning_curves,
    policy_rows,
    policy_table,
    token_correlation,
    token_reward_text,
)
from rto_lightning.rollout import RolloutSettings, Trajectory, TransformersEngine, response_texts, sample_seeds


class GoldReward(Callback):
    """Logs the gold reward of each iteration's responses as `train/gold`. Measured only: RTO never sees it."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        """After each RTO iteration."""
        assert isinstance(pl_module, RTOModule)
        trajectory, prompts = pl_module.last_rollout
        golds = map(gold_reward, prompts, response_texts(trajectory, pl_module.chat))
        pl_module.log("train/gold", sum(golds) / len(prompts), prog_bar=True, batch_size=len(prompts))


class Sampler:
    """Draws answers of one role to a list of prompts, other ones at each call.

    Args:
        backbone: the model and its roles.
        role: who answers.
        max_new_tokens: length limit of an answer.
        seed: seed of the draws.
    """

    def __init__(self, backbone: PolicyBackbone, role: str, max_new_tokens: int, seed: int) -> None:
        self.backbone, self.role, self.seed = backbone, role, seed
        self.engine = TransformersEngine(backbone, RolloutSettings(max_new_tokens, batch_size=256))
        self.calls = 0

    def trajectory(self, prompts: Sequence[list[Message]]) -> Trajectory:
        """One answer to each prompt, as tokens."""
        chat = self.backbone.chat
        rows = [chat.encode_prompt(messages) for messages in prompts]
        padded = Sequences.from_lists(rows, [[] for _ in rows], chat.pad_id)
        seeds = sample_seeds(self.seed, self.calls, torch.arange(len(rows)))
        self.calls += 1
        return self.engine.rollout(self.role, padded.input_ids, padded.attention_mask, seeds)

    def __call__(self, prompts: list[list[Message]]) -> list[str]:
        """One answer to each prompt, as text."""
        return response_texts(self.trajectory(prompts), self.backbone.chat)


def make_preferences(
    output_dir: Path,
    seed: int,
    model: str,
    prompts: str,
    pairs: int = 8000,
    validation_pairs: int = 400,
    temperature: float = 0.5,
    max_new_tokens: int = 36,
) -> None:
    """Sample pairs of answers from a model and let the Bradley-Terry judge label them by gold reward.

    Writes `train.jsonl` and `validation.jsonl`, whose prompts differ.

    Args:
        output_dir: folder to write to.
        seed: seed of the samples and the labels.
        model: folder of the model that answers.
        prompts: JSONL file of prompts.
        pairs: training pairs.
        validation_pairs: validation pairs.
        temperature: how much the judge errs.
        max_new_tokens: length limit of an answer.
    """
    backbone = _backbone(model)
    backbone.add_role("reference")
    sampler = Sampler(backbone, "reference", max_new_tokens, seed)
    rows = [row["prompt"] for row in read_jsonl(prompts)]
    held_out = max(1, len(rows) // 10)
    for name, part, count in (("train", rows[held_out:], pairs), ("validation", rows[:held_out], validation_pairs)):
        write_preferences(output_dir / f"{name}.jsonl", sample_preferences(part, sampler, count, seed, temperature))


def report(
    output_dir: Path,
    seed: int,
    model: str,
    dpo: str,
    ppo: str,
    rto: str,
    prompts: str,
    max_new_tokens: int = 36,
    answers_per_prompt: int = 4,
    examples: int = 3,
) -> None:
    """Compare SFT, DPO, PPO and RTO on held-out prompts by gold reward.

    Writes `report.md` (table, over-optimization, token rewards on example reviews) and `learning_curves.png`, and
    prints the report.

    Args:
        output_dir: folder to write to.
        seed: seed of the answers.
        model: folder of the SFT model, the base of all roles.
        dpo: folder of the DPO stage.
        ppo: folder of the PPO stage.
        rto: folder of the RTO stage.
        prompts: JSONL file of held-out prompts.
        max_new_tokens: length limit of an answer.
        answers_per_prompt: answers of each policy to each prompt.
        examples: answers whose token rewards are shown.
    """
    backbone = _backbone(model)
    backbone.add_role("reference")
    roles = {"SFT": "reference", "DPO": "dpo", "PPO": "ppo", "RTO": "rto"}
    for role, folder in (("dpo", dpo), ("ppo", ppo), ("rto", rto)):
        backbone.add_role(role, str(Path(folder) / "role"))

    messages = [row["prompt"] for row in read_jsonl(prompts)] * answers_per_prompt
    trajectories = {
        name: Sampler(backbone, role, max_new_tokens, seed).trajectory(messages) for name, role in roles.items()
    }
    answers = {name: response_texts(trajectory, backbone.chat) for name, trajectory in trajectories.items()}
    kl = {name: _kl(backbone, roles[name], trajectory) for name, trajectory in trajectories.items()}
    rows = policy_rows(messages, answers, kl)
    curves = {"PPO": read_curve(ppo), "RTO": read_curve(rto)}
    figure = output_dir / "learning_curves.png"
    plot_learning_curves(figure, curves, {row.name: row.gold.mean for row in rows if row.name in ("SFT", "DPO")})

    warnings = [f"- {name}: {text}" for name, curve in curves.items() if (text := over_optimization(curve))]
    readable = _without_special_tokens(trajectories["SFT"], backbone.chat)
    asked = [messages[i] for i in readable.tolist()]
    tokens, rewards = _token_rewards(backbone, trajectories["SFT"].rows(readable))
    correlation = token_correlation(asked, tokens, rewards)
    shown = [token_reward_text(*row) for row in list(zip(asked, tokens, rewards, strict=True))[:examples]]
    prompt_count = len(messages) // answers_per_prompt
    agreement = f", correlation over all tokens {correlation:.2f}" if correlation is not None else ""
    paragraphs = [
        f"{prompt_count} held-out prompts, {answers_per_prompt} answers of each policy to each, seed {seed}:",
        policy_table(rows),
        "\n".join(warnings) or "No over-optimization: no policy won score while it lost gold reward.",
        f"Token rewards log(dpo / reference), in nats, on answers of the SFT model{agreement}:",
        *(f"```\n{example}\n```" for example in shown),
    ]
    text = "\n\n".join(paragraphs) + "\n"
    (output_dir / "report.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nLearning curves: {figure}\nThis text: {output_dir / 'report.md'}")


def read_curve(folder: str) -> list[dict[str, float]]:
    """Gold reward, score and KL of each iteration, from the metrics that an RTO or PPO stage logged last.

    Raises:
        UserError: if the stage logged no metrics.
    """
    logged = sorted((Path(folder) / "metrics").glob("fit*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    if not logged:
        raise UserError(f"{folder}/metrics has no metrics.csv of a training run; train the stage with its CSV logger.")
    path = logged[-1]
    names = {"gold": "train/gold", "score": "train/score", "kl": "train/kl"}
    with path.open(encoding="utf-8") as file:
        return [
            {"iteration": float(row["step"]) + 1, **{key: float(row[name]) for key, name in names.items()}}
            for row in csv.DictReader(file)
            if row.get("train/gold")
        ]


def _backbone(model: str) -> PolicyBackbone:
    settings = BackboneSettings(model)
    return PolicyBackbone(settings, load_chat_tokenizer(settings))


def _without_special_tokens(trajectory: Trajectory, chat: ChatTokenizer) -> Tensor:
    """Rows, (N,) int64, whose answers hold no special token but the stop: only these can be read word by word."""
    special = torch.tensor([i for i in chat.tokenizer.all_special_ids if i not in chat.stop_ids])
    found = torch.isin(trajectory.sequences.response_ids, special) & trajectory.sequences.response_mask
    return (~found.any(-1)).nonzero().squeeze(-1)


@torch.no_grad()
def _kl(backbone: PolicyBackbone, role: str, trajectory: Trajectory) -> list[float]:
    sequences = trajectory.sequences
    logprobs, reference = (backbone.token_logprobs(name, sequences)[0] for name in (role, "reference"))
    mask = sequences.response_mask
    return masked_sum(kl_estimate(logprobs, reference, mask), mask, dim=1).tolist()


@torch.no_grad()
def _token_rewards(backbone: PolicyBackbone, trajectory: Trajectory) -> tuple[list[list[str]], list[list[float]]]:
    sequences = trajectory.sequences
    dpo, reference = (backbone.token_logprobs(name, sequences)[0] for name in ("dpo", "reference"))
    rewards = token_rewards(dpo, reference, sequences.response_mask, beta_1=1.0, clip=0.0)
    tokenizer = backbone.chat.tokenizer
    rows = zip(sequences.response_ids, rewards, sequences.response_mask, strict=True)
    tokens, values = [], []
    for ids, row, mask in rows:
        tokens.append(list(tokenizer.convert_ids_to_tokens(ids[mask].tolist())))
        values.append(row[mask].tolist())
    return tokens, values
