"""The pipeline stages of the quickstart that train nothing: sampling preferences, and comparing what was trained."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from rto_lightning.backbone import Message
from rto_lightning.errors import UserError
from rto_lightning.modules import RTOModule
from rto_lightning.quickstart.curve_figures import plot_learning_curves
from rto_lightning.quickstart.curves import over_optimization, read_curve
from rto_lightning.quickstart.gold import GoldName, gold_reward
from rto_lightning.quickstart.jsonl import read_jsonl
from rto_lightning.quickstart.policies import Sampler, evaluate_policy, load_policies
from rto_lightning.quickstart.preferences import sample_preferences, write_preferences
from rto_lightning.quickstart.report import policy_rows, policy_table
from rto_lightning.quickstart.token_rewards import sample_rewarded_tokens, token_correlation, token_reward_text
from rto_lightning.rollout import response_texts
from rto_lightning.runs.folder import ROLE_FOLDER

BASELINE = "SFT"
CURVES = "learning_curves.png"


class GoldReward(Callback):
    """Logs the gold reward of each iteration's responses as `train/gold`. Measured only: RTO never sees it.

    Args:
        gold: which gold reward.
    """

    def __init__(self, gold: GoldName = "sum") -> None:
        self.gold: GoldName = gold

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        """After each RTO iteration."""
        assert isinstance(pl_module, RTOModule)
        trajectory, prompts = pl_module.last_rollout
        texts = response_texts(trajectory, pl_module.chat)
        golds = [gold_reward(prompt, text, self.gold) for prompt, text in zip(prompts, texts, strict=True)]
        pl_module.log("train/gold", sum(golds) / len(golds), prog_bar=True, batch_size=len(golds))


def make_preferences(
    output_dir: Path,
    seed: int,
    model: str,
    prompts: str,
    pairs: int = 8000,
    validation_pairs: int = 400,
    temperature: float = 0.5,
    max_new_tokens: int = 36,
    gold: GoldName = "sum",
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
        gold: which gold reward the judge sees.
    """
    sampler = Sampler(load_policies(model), "reference", max_new_tokens, seed)
    rows = [row["prompt"] for row in read_jsonl(prompts)]
    held_out = max(1, len(rows) // 10)
    for name, part, count in (("train", rows[held_out:], pairs), ("validation", rows[:held_out], validation_pairs)):
        labelled = sample_preferences(part, sampler, count, seed, temperature, gold=gold)
        write_preferences(output_dir / f"{name}.jsonl", labelled)


def compare(
    output_dir: Path,
    seed: int,
    model: str,
    prompts: str,
    policies: dict[str, str],
    max_new_tokens: int = 36,
    answers_per_prompt: int = 4,
    gold: GoldName = "sum",
) -> None:
    """Compare policies, and the SFT model that they started from, on held-out prompts by gold reward.

    Writes `report.md` (table, over-optimization) and `learning_curves.png`, and prints the report.

    Args:
        output_dir: folder to write to.
        seed: seed of the answers.
        model: folder of the SFT model, the base of all roles.
        prompts: JSONL file of held-out prompts.
        policies: for each policy's name in the table the folder of its stage, in the table's order. Those that logged
            the gold reward of their iterations (`GoldReward`) have learning curves.
        max_new_tokens: length limit of an answer.
        answers_per_prompt: answers of each policy to each prompt.
        gold: which gold reward.
    """
    messages = [row["prompt"] for row in read_jsonl(prompts)]
    paragraphs = _compare(output_dir, seed, model, messages, policies, max_new_tokens, answers_per_prompt, gold)
    _write_report(output_dir, paragraphs)


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
    gold: GoldName = "sum",
) -> None:
    """Compare SFT, DPO, PPO and RTO as `compare` does, and show token rewards on example reviews.

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
        examples: answers whose token rewards are shown, beside the gold weights of the `sum`.
        gold: which gold reward the table and the curves show.
    """
    policies = {"DPO": dpo, "PPO": ppo, "RTO": rto}
    messages = [row["prompt"] for row in read_jsonl(prompts)]
    paragraphs = _compare(output_dir, seed, model, messages, policies, max_new_tokens, answers_per_prompt, gold)
    backbone = load_policies(model, {"dpo": str(Path(dpo) / ROLE_FOLDER)})
    rewarded = sample_rewarded_tokens(backbone, messages, answers_per_prompt, max_new_tokens, seed)
    correlation = token_correlation(*rewarded)
    agreement = f", correlation over all tokens {correlation:.2f}" if correlation is not None else ""
    shown = list(zip(*rewarded, strict=True))[:examples]
    paragraphs += [
        f"Token rewards log(dpo / reference), in nats, on answers of the SFT model{agreement}:",
        *(f"```\n{token_reward_text(*row)}\n```" for row in shown),
    ]
    _write_report(output_dir, paragraphs)


def _compare(
    output_dir: Path,
    seed: int,
    model: str,
    prompts: Sequence[list[Message]],
    policies: Mapping[str, str],
    max_new_tokens: int,
    answers_per_prompt: int,
    gold: GoldName,
) -> list[str]:
    """Draw the learning curves, if there are any, and return the paragraphs of the report."""
    if BASELINE in policies:
        raise UserError(f"A policy is named {BASELINE}, as the model that all started from; give it another name.")
    options = (prompts, answers_per_prompt, max_new_tokens, seed, gold)
    evaluations = {BASELINE: evaluate_policy(load_policies(model), "reference", *options)}
    for name, folder in policies.items():
        # A backbone of its own for each, so that the memory does not grow with the policies.
        backbone = load_policies(model, {"policy": str(Path(folder) / ROLE_FOLDER)})
        evaluations[name] = evaluate_policy(backbone, "policy", *options)
    rows = policy_rows(evaluations, BASELINE)
    curves = {name: curve for name, folder in policies.items() if (curve := read_curve(folder))}
    paragraphs = [
        f"{len(prompts)} held-out prompts, {answers_per_prompt} answers of each policy to each, seed {seed}:",
        policy_table(rows, BASELINE),
    ]
    if curves:
        levels = {row.name: row.gold.mean for row in rows if row.name.upper() in (BASELINE, "DPO")}
        plot_learning_curves(output_dir / CURVES, curves, levels)
        warnings = [f"- {name}: {text}" for name, curve in curves.items() if (text := over_optimization(curve))]
        paragraphs.append("\n".join(warnings) or "No over-optimization: no policy won score while it lost gold reward.")
    return paragraphs


def _write_report(output_dir: Path, paragraphs: Sequence[str]) -> None:
    text = "\n\n".join(paragraphs) + "\n"
    (output_dir / "report.md").write_text(text, encoding="utf-8")
    figure = [f"Learning curves: {output_dir / CURVES}"] if (output_dir / CURVES).exists() else []
    print("\n".join(["", text, *figure, f"This text: {output_dir / 'report.md'}"]))
