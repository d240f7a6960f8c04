"""What the quickstart shows at its end: the table of policies, learning curves, and token rewards of examples.

All functions take plain lists, so that they serve a notebook as well. The gold reward enters here to measure.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rto_lightning.errors import UserError
from rto_lightning.quickstart.gold import STOP, gold_reward, gold_token_rewards
from rto_lightning.quickstart.grammar import Message, words


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error over prompts."""

    mean: float
    error: float
    """Standard error of the mean; nan for a single prompt."""

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
    kl: Estimate | None
    """KL divergence to the reference policy in nats a response; None where it was not measured."""
    win_rate: float | None
    """Share of prompts where the gold reward beats the baseline's, ties as half; None for the baseline."""


def policy_rows(
    prompts: Sequence[Sequence[Message]],
    responses: Mapping[str, Sequence[str]],
    kl: Mapping[str, Sequence[float]] | None = None,
    baseline: str = "SFT",
) -> list[PolicyRow]:
    """Compare policies on the same test prompts.

    A prompt may occur several times, each time with another sample; its samples are averaged first, so that
    the standard errors are over prompts.

    Args:
        prompts: N prompts.
        responses: for each policy its N responses, in the order of the prompts.
        kl: for each policy N sequence-level KL values, in nats; policies may be missing.
        baseline: the policy to compare with.

    Raises:
        UserError: if the baseline is missing, or a policy has another number of responses or KL values.
    """
    kl = kl or {}
    if baseline not in responses:
        raise UserError(f"The baseline {baseline!r} has no responses; the policies are {', '.join(responses)}.")
    for kind, columns in (("responses", responses), ("KL values", kl)):
        for name, column in columns.items():
            if len(column) != len(prompts):
                raise UserError(
                    f"{name} has {len(column)} {kind} for {len(prompts)} prompts; give one for each prompt."
                )
    clusters = [prompt[-1]["content"] for prompt in prompts]
    gold = {
        name: [gold_reward(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        for name, texts in responses.items()
    }
    rows = []
    for name, texts in responses.items():
        differences = [ours - theirs for ours, theirs in zip(gold[name], gold[baseline], strict=True)]
        is_baseline = name == baseline
        rows.append(
            PolicyRow(
                name=name,
                gold=_estimate(gold[name], clusters),
                gain=None if is_baseline else _estimate(differences, clusters),
                length=_estimate([float(len(words(text))) for text in texts], clusters),
                kl=_estimate(kl[name], clusters) if name in kl else None,
                win_rate=None if is_baseline else _win_rate(differences, clusters),
            )
        )
    return rows


def _prompt_means(values: Sequence[float], clusters: Sequence[str]) -> list[float]:
    groups: dict[str, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        groups.setdefault(cluster, []).append(value)
    return [statistics.fmean(group) for group in groups.values()]


def _estimate(values: Sequence[float], clusters: Sequence[str]) -> Estimate:
    means = _prompt_means(values, clusters)
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return Estimate(statistics.fmean(means), error)


def _win_rate(differences: Sequence[float], clusters: Sequence[str]) -> float:
    # Sums of the same weights in another order differ in the last bits; they are ties.
    wins = [0.5 if abs(value) < 1e-9 else float(value > 0.0) for value in differences]
    return statistics.fmean(_prompt_means(wins, clusters))


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
            "" if row.kl is None else str(row.kl),
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


@dataclass(frozen=True)
class CurveKeys:
    """Names of the quantities in the records of a learning curve."""

    iteration: str = "iteration"
    """PPO iterations done."""
    gold: str = "gold"
    """Mean gold reward of the iteration's responses."""
    score: str = "score"
    """Mean score of the reward model."""
    kl: str = "kl"
    """Mean KL divergence to the reference, in nats a response."""


def over_optimization(
    curve: Sequence[Mapping[str, float]],
    keys: CurveKeys | None = None,
    window: int = 5,
    tolerance: float = 0.1,
) -> str | None:
    """Say whether a run won reward-model score while it lost gold reward, and None if it did not.

    Both are smoothed by a moving average. Over-optimization is a fall of the gold reward, from its best to the
    end, by more than `tolerance` of what was won until then, while the score rose over the same iterations, both
    by more than their noise. A gold reward that only ever fell has its best at the start, and counts as well.

    Args:
        curve: records with the iteration, the gold reward and the score.
        keys: the records' names for them.
        window: iterations in the moving average.
        tolerance: fraction of the gain that may be lost again.
    """
    keys = keys or CurveKeys()
    points = [record for record in curve if _finite(record, keys.gold) and _finite(record, keys.score)]
    if len(points) < 2 * window:
        return None
    gold = _moving_average([point[keys.gold] for point in points], window)
    score = _moving_average([point[keys.score] for point in points], window)
    # Four standard errors of an average: the peak is the best of many, and so partly luck.
    gold_noise = 4.0 * _noise([point[keys.gold] for point in points]) / math.sqrt(window)
    score_noise = 4.0 * _noise([point[keys.score] for point in points]) / math.sqrt(window)
    peak = max(range(len(gold)), key=gold.__getitem__)
    lost, won = gold[peak] - gold[-1], score[-1] - score[peak]
    if lost <= max(tolerance * (gold[peak] - gold[0]), gold_noise) or won <= score_noise:
        return None
    iteration = points[min(peak + window // 2, len(points) - 1)][keys.iteration]
    return (
        f"over-optimization: since iteration {iteration:.0f} the reward model's score rose from "
        f"{score[peak]:.2f} to {score[-1]:.2f} while the gold reward fell from {gold[peak]:.2f} to {gold[-1]:.2f}"
    )


def _finite(record: Mapping[str, float], key: str) -> bool:
    value = record.get(key)
    return value is not None and math.isfinite(value)


def _moving_average(values: Sequence[float], window: int) -> list[float]:
    return [statistics.fmean(values[start : start + window]) for start in range(len(values) - window + 1)]


def _noise(values: Sequence[float]) -> float:
    """Standard deviation of one value about a smooth curve, from second differences."""
    second = [values[i - 1] - 2.0 * values[i] + values[i + 1] for i in range(1, len(values) - 1)]
    return math.sqrt(statistics.fmean([value * value for value in second]) / 6.0) if second else 0.0


# Okabe and Ito's palette, whose colours the colour-blind tell apart; markers and dashes say it once more.
_STYLES = (
    {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    {"color": "#009E73", "linestyle": "-.", "marker": "^"},
    {"color": "#CC79A7", "linestyle": ":", "marker": "D"},
)


def plot_learning_curves(
    path: str | Path,
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    gold_levels: Mapping[str, float] | None = None,
    keys: CurveKeys | None = None,
) -> None:
    """Draw gold reward, reward-model score and KL against iterations, one line a run, and write a PNG.

    Args:
        path: file to write, over an old one.
        curves: for each run its records; a record may lack a quantity or hold nan for it.
        gold_levels: horizontal lines in the gold panel, such as the SFT and the DPO policy.
        keys: the records' names for the quantities.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    keys = keys or CurveKeys()
    # Without pyplot no window system is needed, and no figure of the caller's is touched.
    figure = Figure(figsize=(11.0, 3.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        (keys.gold, "gold reward", "gold reward (mean a response)"),
        (keys.score, "reward-model score", "score (mean a response, r.m. units)"),
        (keys.kl, "distance from the reference", "KL (nats a response)"),
    )
    axes = figure.subplots(1, len(panels))
    for axis, (key, title, label) in zip(axes, panels, strict=True):
        for (name, curve), style in zip(curves.items(), _cycle(_STYLES, len(curves)), strict=True):
            points = [record for record in curve if _finite(record, key)]
            axis.plot(
                [point[keys.iteration] for point in points],
                [point[key] for point in points],
                label=name,
                linewidth=1.8,
                markersize=4.5,
                markevery=max(1, len(points) // 8),
                **style,
            )
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("PPO iteration")
        axis.set_ylabel(label)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for level_name, level in (gold_levels or {}).items():
        axes[0].axhline(level, color="0.45", linewidth=1.0, linestyle=(0, (1, 2)))
        axes[0].annotate(
            level_name,
            (1.0, level),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 2),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=8,
            color="0.35",
        )
    axes[-1].set_ylim(bottom=min(0.0, axes[-1].get_ylim()[0]))
    axes[1].legend(frameon=False, loc="lower right")  # where rising curves leave room
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _cycle(styles: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    return [styles[index % len(styles)] for index in range(count)]


def token_reward_text(
    prompt: Sequence[Message],
    tokens: Sequence[str],
    rewards: Sequence[float],
    bar_width: int = 10,
    name: str = "token reward",
) -> str:
    """Show token rewards beside the gold weights of the same tokens, one token a line.

    Both columns have bars to the left of the axis for negative and to the right for positive values, each
    column scaled to its own largest value: the two are not in the same units.

    Args:
        prompt: a prompt of the quickstart.
        tokens: T tokens of one response; a stop token is shown as `STOP`.
        rewards: T rewards, those which RTO gives to the tokens.
        bar_width: characters of the longest bar.
        name: heading of the rewards' column.

    Raises:
        UserError: if there are not as many rewards as tokens.
    """
    if len(tokens) != len(rewards):
        raise UserError(f"There are {len(rewards)} rewards for {len(tokens)} tokens; give one for each token.")
    body = [token for token in tokens if token != STOP]
    gold = [weight for _, weight in gold_token_rewards(prompt, " ".join(body))]
    if len(gold) - 1 != len(body):
        raise UserError("A token is not one word or mark of the quickstart; show tokens of its own tokenizer only.")
    if len(body) == len(tokens):
        # Cut off before its stop: there is no token to show the stop's weight beside.
        gold = gold[:-1]
    token_width = max([len("token"), *(len(token) for token in tokens)])
    column = 2 * bar_width + 9
    lines = [
        prompt[-1]["content"],
        f"{'token':<{token_width}}  {name:<{column}}  {'gold weight':<{column}}".rstrip(),
    ]
    reward_scale = max((abs(value) for value in rewards), default=0.0)
    gold_scale = max((abs(value) for value in gold), default=0.0)
    for token, reward, weight in zip(tokens, rewards, gold, strict=True):
        cells = [_bar(reward, reward_scale, bar_width), _bar(weight, gold_scale, bar_width)]
        lines.append(f"{token:<{token_width}}  {cells[0]:<{column}}  {cells[1]}".rstrip())
    total = f"{'sum':<{token_width}}  {sum(rewards):+7.3f}{'':{column - 7}}  {sum(gold):+7.3f}"
    lines.append(total)
    correlation = _correlation(rewards, gold)
    if correlation is not None:
        lines.append(f"correlation over these {len(tokens)} tokens: {correlation:.2f}")
    return "\n".join(lines)


def _bar(value: float, scale: float, width: int) -> str:
    length = round(width * abs(value) / scale) if scale > 0.0 else 0
    left = ("-" * length if value < 0.0 else "").rjust(width)
    right = ("+" * length if value > 0.0 else "").ljust(width)
    return f"{value:+7.3f} {left}|{right}"


def _correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    if len(a) < 3 or len(set(a)) == 1 or len(set(b)) == 1:
        return None
    return statistics.correlation(a, b)


def token_correlation(
    prompts: Sequence[Sequence[Message]], tokens: Sequence[Sequence[str]], rewards: Sequence[Sequence[float]]
) -> float | None:
    """Pearson correlation of token rewards with gold weights over all tokens of all responses.

    Args:
        prompts: N prompts.
        tokens: the tokens of each response, as in `token_reward_text`.
        rewards: their rewards.

    Returns:
        The correlation, or None where one side does not vary.
    """
    ours: list[float] = []
    gold: list[float] = []
    for prompt, response, values in zip(prompts, tokens, rewards, strict=True):
        body = [token for token in response if token != STOP]
        weights = [weight for _, weight in gold_token_rewards(prompt, " ".join(body))]
        gold.extend(weights[: len(response)])
        ours.extend(values)
    if len(gold) != len(ours):
        raise UserError("The rewards and the responses differ in their numbers of tokens; give one for each token.")
    return _correlation(ours, gold)
