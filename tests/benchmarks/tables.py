"""The report's text, from the kept document alone."""

from collections.abc import Mapping, Sequence
from typing import Any

GOLDS = {
    "sum": "Gold reward: the sum over tokens",
    "requirement": "Gold reward: a requirement on the whole answer",
}
NONE = "–"


def markdown(document: Mapping[str, Any], figure: str) -> str:
    """Tables of the whole benchmark in Markdown.

    Args:
        document: see `document.py`.
        figure: the picture's path, as the text is to name it.
    """
    runs = [run for gold in document["golds"].values() for run in gold["methods"]["ppo"]["runs"]]
    seeds = ", ".join(str(seed) for seed in sorted({run["seed"] for run in runs})) or "none yet"
    head = (
        f"Fresh seeds {seeds}; {document['iterations']} iterations of {document['responses']} sampled responses; mean "
        "over seeds, in brackets the 95% interval by Student's t. Made by `tests/benchmarks/sample_efficiency.py`."
    )
    blocks = ["# Sample efficiency on the embedded task", head]
    if document["missing"]:
        blocks.append(f"**Not finished: {document['missing']} runs are missing.**")
    caption = "Trailing means over seeds; bands are the 95% intervals of PPO and RTO, the dotted line is PPO's end."
    blocks += [f"![Gold reward against sampled responses and against KL]({figure})", caption]
    for name, gold in document["golds"].items():
        blocks += [f"## {GOLDS[name]}", _preparation(gold), _online(gold, document), _notes(document), _direct(gold)]
        blocks += [f"### Tried ({name})", _tried(gold)]
    blocks += ["## Sweep of RTO (sum)", _sweep(document)]
    failures = _failures(document)
    blocks += ["## Failures", "\n".join(f"- {line}" for line in failures) or "No run failed or diverged."]
    commits = ", ".join(document["commits"])
    blocks.append(f"Commits of the runs (+: with changes of the day): {commits}.")
    return "\n\n".join(block for block in blocks if block) + "\n"


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """A number, or a dash."""
    return NONE if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def bracket(interval: Mapping[str, Any] | None, digits: int = 2, sign: bool = False) -> str:
    """Mean and interval."""
    if interval is None:
        return NONE
    mean, low, high = (number(interval[name], digits, sign) for name in ("mean", "low", "high"))
    return mean if interval["low"] is None else f"{mean} ({low} to {high})"


def settings_text(settings: Mapping[str, Any] | None) -> str:
    """Settings as words."""
    if settings is None:
        return "not chosen yet"
    parts = []
    for name, value in settings.items():
        off = name == "token_reward_clip" and value == 0
        parts.append(f"{name.removeprefix('model.')} {'off' if off else value}")
    return ", ".join(parts)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _online(gold: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    header = [
        "method",
        "configuration",
        "share of PPO's responses",
        "reached",
        "ratio to PPO's own share",
        "gold",
        "gold minus PPO's",
        "gold minus PPO's at PPO's KL (seeds)",
        "KL, nats",
        "length",
        "diverged, failed",
    ]
    rows = []
    for method in gold["methods"].values():
        line = method["summary"]
        at_kl = line["gold_at_kl_difference"]
        rows.append(
            [
                method["title"],
                settings_text(method["chosen"]),
                bracket(line["share"]),
                f"{line['reached']} of {line['runs']}",
                bracket(line["share_ratio"]),
                bracket(line["gold"]),
                NONE if method["title"] == "PPO" else bracket(line["gold_difference"], sign=True),
                NONE if at_kl is None or method["title"] == "PPO" else f"{bracket(at_kl, sign=True)} ({at_kl['n']})",
                bracket(line["kl"], 1),
                bracket(line["length"], 1),
                f"{line['diverged']}, {line['failed']}",
            ]
        )
    shared = settings_text(gold["shared"]["chosen"])
    return f"Shared by all, chosen for PPO: {shared}.\n\n" + table(header, rows)


def _notes(document: Mapping[str, Any]) -> str:
    window, iterations = document["window"], document["iterations"]
    return (
        f"Share of PPO's responses: the first iteration at which the mean training gold reward of the last {window} "
        f"iterations is at least PPO's over its last {window} of the same seed, divided by {iterations}; a seed that "
        f"never gets there counts as 1, and no share can be below {window / iterations:.3f}. PPO's own share is below "
        "1 where it reached its plateau early. At PPO's KL: gold reward of the smoothed training curve where it first "
        "passes the KL that PPO ends with, on the seeds where it does. Gold, KL and length are of answers to test "
        "prompts; configurations were chosen on validation prompts and other seeds."
    )


def _direct(gold: Mapping[str, Any]) -> str:
    rows = []
    for method in gold["direct"].values():
        line = method["summary"]
        if method["runs"]:
            figures = (bracket(line["gold"]), bracket(line["kl"], 1), bracket(line["length"], 1))
            rows.append([method["title"], settings_text(method["settings"]) or "as in dpo.yaml", *figures])
    if not rows:
        return ""
    note = "Direct preference learning on the same seeds and preferences, one configuration each, not tuned here:"
    return f"{note}\n\n" + table(["method", "configuration", "gold", "KL, nats", "length"], rows)


def _preparation(gold: Mapping[str, Any]) -> str:
    fresh = {run["seed"] for run in gold["methods"]["ppo"]["runs"]}
    rows = [row for row in gold["preparation"] if row["seed"] in fresh]
    if not rows:
        return ""

    def span(values: Sequence[float | None], digits: int = 2) -> str:
        given = [value for value in values if value is not None]
        return f"{sum(given) / len(given):.{digits}f} ({min(given):.{digits}f} to {max(given):.{digits}f})"

    parts = [
        f"reward model right on {span([row['reward_model_accuracy'] for row in rows])} of held-out pairs, DPO on "
        f"{span([row['dpo_accuracy'] for row in rows])}",
        f"correlation of score and gold reward on SFT answers {span([row['score_gold_correlation'] for row in rows])}",
    ]
    ranks = [row["token_reward_rank_correlation"] for row in rows]
    if any(rank is not None for rank in ranks):
        parts.append(f"rank correlation of token rewards and gold token weights {span(ranks)}")
    for name in ("SFT", "DPO"):
        policy = [row["policies"][name] for row in rows]
        parts.append(
            f"{name} gold {span([p['gold'] for p in policy])}, length {span([p['length'] for p in policy], 1)}"
        )
    return "What all start from, mean (lowest to highest) over the fresh seeds: " + "; ".join(parts) + "."


def _tried(gold: Mapping[str, Any]) -> str:
    groups = [("PPO, shared settings", gold["shared"]["tried"], gold["shared"]["chosen"])]
    groups += [(method["title"], method["tried"], method["chosen"]) for method in gold["methods"].values()]
    rows = []
    for title, tried, chosen in groups:
        for row in tried:
            runs = row["runs"]
            text = settings_text(row["settings"])
            rows.append(
                [
                    title,
                    f"**{text}**" if row["settings"] == chosen else text,
                    *(
                        ", ".join(number(run[split] and run[split][name]) for run in runs) or NONE
                        for split, name in (("validation", "gold"), ("test", "gold"), ("test", "kl"))
                    ),
                ]
            )
    note = "Every configuration that was tried, a value a seed; the chosen one is bold."
    return f"{note}\n\n" + table(["method", "configuration", "validation gold", "test gold", "KL, nats"], rows)


def _sweep(document: Mapping[str, Any]) -> str:
    rows = []
    for row in document["sweep"]:
        runs = [run for run in row["runs"] if run["error"] is None]
        means = {
            name: sum(run["test"][name] for run in runs) / len(runs) if runs else None
            for name in ("gold", "kl", "length")
        }
        golds = ", ".join(number(run["test"] and run["test"]["gold"]) for run in row["runs"])
        rows.append([settings_text(row["settings"]), number(means["gold"]), golds, number(means["kl"], 1)])
        rows[-1].append(number(means["length"], 1))
    return table(["configuration", "gold", "each seed", "KL, nats", "length"], rows) if rows else "Not run yet."


def _failures(document: Mapping[str, Any]) -> list[str]:
    groups: list[tuple[str, Sequence[Mapping[str, Any]]]] = []
    for name, gold in document["golds"].items():
        groups += [(f"{name}, {method['title']}, chosen", method["runs"]) for method in gold["methods"].values()]
        groups += [(f"{name}, {method['title']}", method["runs"]) for method in gold["direct"].values()]
        groups += [
            (f"{name}, {method['title']}, tried {settings_text(row['settings'])}", row["runs"])
            for method in gold["methods"].values()
            for row in method["tried"]
        ]
        groups += [(f"{name}, shared {settings_text(row['settings'])}", row["runs"]) for row in gold["shared"]["tried"]]
    groups += [(f"sweep, {settings_text(row['settings'])}", row["runs"]) for row in document["sweep"]]
    return [
        f"{title}, seed {run['seed']}: {run['error'] or 'diverged (a quantity was not finite)'}"
        for title, runs in groups
        for run in runs
        if run["error"] is not None or run["diverged"]
    ]
