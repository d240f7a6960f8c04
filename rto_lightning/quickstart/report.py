"""The table that compares policies on the quickstart's held-out prompts."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rto_lightning.backbone import Message
from rto_lightning.errors import UserError
from rto_lightning.quickstart.gold import GoldName, gold_reward
from rto_lightning.quickstart.policies import PolicyEvaluation


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error over prompts."""

    mean: float
    error: float
    """Standard error of the mean; nan for a single prompt."""

    @property
    def interval(self) -> tuple[float, float]:
        """The interval of 95%, for a number of prompts at which the mean is normal, such as 30 and more."""
        return self.mean - 1.96 * self.error, self.mean + 1.96 * self.error

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.error:.2f}"


@dataclass(frozen=True)
class PolicyRow:
    """One policy's line in the table."""

    name: str
    gold: Estimate
    """Gold reward of a response."""
    gain: Estimate | None
    """Paired difference of gold reward to the baseline on the same prompts; None for the baseline itself."""
    length: Estimate
    """Tokens of a response without its stop."""
    kl: Estimate
    """KL divergence to the reference policy in nats a response."""
    win_rate: float | None
    """Share of answers whose gold reward beats that of the baseline's answer, ties as half; None for the baseline."""


def policy_rows(evaluations: Mapping[str, PolicyEvaluation], baseline: str = "SFT") -> list[PolicyRow]:
    """Compare policies that were evaluated on the same prompts.

    The samples of a prompt are averaged first, so that the standard errors are over prompts.

    Args:
        evaluations: for each policy its evaluation, all with the same P prompts and K answers to each.
        baseline: the policy to compare with.

    Raises:
        UserError: if the baseline is missing, or a policy has other numbers of prompts or answers.
    """
    if baseline not in evaluations:
        raise UserError(f"The baseline {baseline!r} was not evaluated; the policies are {', '.join(evaluations)}.")
    base = evaluations[baseline]
    rows = []
    for name, evaluation in evaluations.items():
        if [len(answers) for answers in evaluation.answer_gold] != [len(answers) for answers in base.answer_gold]:
            raise UserError(
                f"{name} and {baseline} were evaluated on other numbers of prompts or answers; evaluate them alike."
            )
        differences = [
            [ours - theirs for ours, theirs in zip(*answers, strict=True)]
            for answers in zip(evaluation.answer_gold, base.answer_gold, strict=True)
        ]
        is_baseline = name == baseline
        rows.append(
            PolicyRow(
                name=name,
                gold=_estimate(evaluation.gold),
                gain=None if is_baseline else _estimate([statistics.fmean(answers) for answers in differences]),
                length=_estimate(evaluation.length),
                kl=_estimate(evaluation.kl),
                win_rate=None if is_baseline else _win_rate(differences),
            )
        )
    return rows


def _estimate(means: Sequence[float]) -> Estimate:
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return Estimate(statistics.fmean(means), error)


def _win_rate(differences: Sequence[Sequence[float]]) -> float:
    # Sums of the same weights in another order differ in the last bits; they are ties.
    wins = [[0.5 if abs(value) < 1e-9 else float(value > 0.0) for value in answers] for answers in differences]
    return statistics.fmean([statistics.fmean(answers) for answers in wins])


def policy_table(rows: Sequence[PolicyRow], baseline: str = "SFT") -> str:
    """The rows as a Markdown table, aligned for the terminal too."""
    header = [
        "policy",
        "gold reward",
        f"gain over {baseline}",
        f"win rate against {baseline}",
        "KL (nats)",
        "length (tokens)",
    ]
    cells = [
        [
            row.name,
            str(row.gold),
            "" if row.gain is None else f"{row.gain.mean:+.2f} ± {row.gain.error:.2f}",
            "" if row.win_rate is None else f"{100.0 * row.win_rate:.1f}%",
            str(row.kl),
            str(row.length),
        ]
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [header, *cells]) for column in range(len(header))]

    def line(values: Sequence[str]) -> str:
        padded = [values[0].ljust(widths[0])]
        padded += [value.rjust(width) for value, width in zip(values[1:], widths[1:], strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = [":" + "-" * (widths[0] - 1)] + ["-" * (width - 1) + ":" for width in widths[1:]]
    return "\n".join([line(header), line(rule), *(line(values) for values in cells)])


def answers_text(
    prompts: Sequence[Sequence[Message]], answers: Mapping[str, Sequence[str]], gold: GoldName = "sum"
) -> str:
    """Answers of several policies to the same prompts, each behind its gold reward, as plain text.

    Args:
        prompts: P prompts of the quickstart.
        answers: for each policy P answers.
        gold: which gold reward.

    Raises:
        UserError: if a policy has another number of answers.
    """
    for name, texts in answers.items():
        if len(texts) != len(prompts):
            raise UserError(f"{name} has {len(texts)} answers to {len(prompts)} prompts; give one to each.")
    width = max(map(len, answers), default=0)
    paragraphs = (
        "\n".join(
            [prompt[-1]["content"]]
            + [
                f"  {name:<{width}}  {gold_reward(prompt, texts[row], gold):+5.2f}  {texts[row]}"
                for name, texts in answers.items()
            ]
        )
        for row, prompt in enumerate(prompts)
    )
    return "\n\n".join(paragraphs)
