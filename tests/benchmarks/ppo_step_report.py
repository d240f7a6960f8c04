"""From what the contenders measured to medians, ratios, targets and tables; pure functions."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from tests.benchmarks.ppo_step_work import Measured, Work

OURS = ("rto", "rto_reread", "ppo", "rto_shared")
TRL = ("trl", "trl_lora_value")
TARGETS = (
    ("rto", "floor", "seconds", 1.15),
    ("rto", "trl", "seconds", 0.8),
    ("rto_shared", "trl", "seconds", 0.6),
    ("rto", "trl", "memory", 0.4),
)
"""Ratios that the project set itself for float32 on a CPU: contender, compared with, quantity, at most."""
DIFFERENCES = """\
What the sides do differently:
- All sample the same number of tokens from prompts of the same length; none can stop early. Token counts are checked.
- RTO reads the responses as policy, reference, dpo (with output layer), reward and critic (without); PPO has no dpo.
- With `ppo.sampling_logprobs`, by default on in float32, the sampler keeps the policy's log-probabilities, and that
  forward is spared. `rto_reread` has it off. `floor` always has the forward, `sampled floor` has not.
- `rto_shared` has a head on the policy as its critic: no forward and no backward of a critic, here and in its floors.
- TRL has no dpo forward, and takes the policy's log-probabilities from the sampler too.
- TRL samples and scores all prompts at once; RTO and PPO score two micro-batches at a time.
- TRL applies the output layer to prompt positions too, and backpropagates one joint loss of policy and value.
- TRL's reward and value models are copies of the body; `trl` trains all of the value model, `trl_lora_value` adapters.
- TRL collects Python's garbage twice an iteration; once of that is in its scoring, once in the rest.
- In bfloat16 TRL's value model is trained without float32 masters; adapters are float32 everywhere.
- The floor has no rewards, advantages, gradient norms or optimizer steps. The reference is read without adapter.
- Floor and TRL run `generate`, PEFT's LoRA layers and PyTorch's linear layers as they are. What this project has in
  their place is what is compared, and where a ratio to the floor below 1 would come from.
- Peak memory is that of a fresh process each (VmHWM), Python and imports included."""


def kept(rounds: Sequence[Measured]) -> dict[str, Any]:
    """The rounds of a contender as one, each without its warm-up iteration.

    Returns:
        `seconds` (not of the floor) and `phases`, lists in seconds; `prompt_tokens` and `sampled_tokens`, lists;
        `memory` with the largest `peak` and the median `imports`, bytes; `versions`; `trained_weights` (not of the
        floor); `sampling_logprobs` (of `OURS`).
    """
    first = rounds[0]
    result: dict[str, Any] = {
        key: [value for measured in rounds for value in measured[key][1:]]
        for key in ("seconds", "prompt_tokens", "sampled_tokens")
        if key in first
    }
    result["phases"] = {
        name: [value for measured in rounds for value in measured["phases"][name][1:]] for name in first["phases"]
    }
    result["memory"] = {
        "peak": max(measured["memory"]["peak"] for measured in rounds),
        "imports": int(median(measured["memory"]["imports"] for measured in rounds)),
    }
    return result | {key: first[key] for key in ("versions", "trained_weights", "sampling_logprobs") if key in first}


def floor_counts(contender: str, sampled: bool = False) -> dict[str, int]:
    """How often an iteration needs each part of the floor.

    Args:
        contender: one of `OURS`.
        sampled: the sampler keeps the policy's log-probabilities, so that the policy is not read again.
    """
    critic = int(contender != "rto_shared")
    return {
        "generate": 1,
        "forward_head": int(not sampled) + int(contender != "ppo"),  # policy and dpo
        "forward_head_reference": 1,
        "forward_body": 1 + critic,  # reward and critic
        "backward_head": 1,
        "backward_body": critic,
    }


def floor_seconds(phases: Mapping[str, Sequence[float]], counts: Mapping[str, int]) -> list[float]:
    """Seconds of an iteration that is nothing but its parts, one for each kept iteration."""
    return [
        sum(count * seconds for count, seconds in zip(counts.values(), parts, strict=True))
        for parts in zip(*(phases[name] for name in counts), strict=True)
    ]


def summarize(rounds: Mapping[str, Sequence[Measured]]) -> dict[str, Any]:
    """Minimum and median of every contender, and all ratios between them.

    Args:
        rounds: contender to what it measured in each round.

    Returns:
        `contenders`; `floor`, seconds of that of each contender, see :func:`floor_counts`; `ratios` of medians, of
        minima and of peak memory; `targets`.
    """
    contenders = {name: kept(measured) for name, measured in rounds.items() if measured}
    seconds: dict[str, list[float]] = {
        name: contender["seconds"] for name, contender in contenders.items() if "seconds" in contender
    }
    floors = {}
    if "floor" in contenders:
        phases = contenders["floor"]["phases"]
        for name in ("rto", "ppo", "rto_shared"):
            floors[name] = floor_seconds(phases, floor_counts(name))
            floors[f"{name}, sampled"] = floor_seconds(phases, floor_counts(name, sampled=True))
    for contender in contenders.values():
        if "seconds" in contender:
            contender |= {"minimum": min(contender["seconds"]), "median": median(contender["seconds"])}
        contender["phase_medians"] = {name: median(values) for name, values in contender["phases"].items()}
    ratios = []
    for name in OURS:
        if name not in seconds:
            continue
        if floors:
            algorithm = "rto" if name == "rto_reread" else name
            ratios.append(_ratio(name, "floor", seconds[name], floors[algorithm], None))
            if contenders[name]["sampling_logprobs"]:
                ratios.append(_ratio(name, "sampled floor", seconds[name], floors[f"{algorithm}, sampled"], None))
        for other in TRL:
            if other in seconds:
                memory = contenders[name]["memory"]["peak"] / contenders[other]["memory"]["peak"]
                ratios.append(_ratio(name, other, seconds[name], seconds[other], memory))
    return {
        "contenders": contenders,
        "floor": {
            name: {"minimum": min(values), "median": median(values), "all": values} for name, values in floors.items()
        },
        "ratios": ratios,
        "targets": [_target(ratios, *target) for target in TARGETS],
    }


def wrong_counts(work: Work, rounds: Mapping[str, Sequence[Measured]]) -> list[str]:
    """A sentence for each contender that did not sample exactly what the work says, warm-up included."""
    expected = {"prompt_tokens": work.prompts * work.prompt_tokens, "sampled_tokens": work.sampled_tokens}
    return [
        f"{name} has {what.replace('_', ' ')} {counts} in its iterations, not {number} in each of {work.steps}."
        for name, measured in rounds.items()
        for one in measured
        for what, number in expected.items()
        if (counts := one[what]) != [number] * work.steps
    ]


def tables(summary: Mapping[str, Any]) -> str:
    """The summary in Markdown."""
    contenders = summary["contenders"]
    lines = [
        "| contender | s an iteration, min | median | rollout | scoring | update | rest | peak GB | of that imports "
        "| trained weights, M |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, contender in contenders.items():
        memory = f"{contender['memory']['peak'] / 1e9:.2f} | {contender['memory']['imports'] / 1e9:.2f} |"
        if "seconds" in contender:
            phases = " | ".join(f"{seconds:.2f}" for seconds in (*contender["phase_medians"].values(), rest(contender)))
            weights = f"{contender['trained_weights'] / 1e6:.2f} |"
            each = f"{contender['minimum']:.2f} | {contender['median']:.2f}"
            lines.append(f"| {name} | {each} | {phases} | {memory} {weights}")
        else:
            for algorithm, value in summary["floor"].items():
                each = f"{value['minimum']:.2f} | {value['median']:.2f}"
                lines.append(f"| floor of {algorithm} | {each} | - | - | - | - | {memory} - |")
    if summary["floor"]:
        names = ("rto", "ppo", "rto_shared")
        lines += ["", f"| part of the floor | s, median | times in {' | in '.join(names)} |", "|---|---|---|---|---|"]
        for name, value in contenders["floor"]["phase_medians"].items():
            counts = " | ".join(str(floor_counts(contender)[name]) for contender in names)
            lines.append(f"| {name} | {value:.2f} | {counts} |")
    if summary["ratios"]:
        lines += ["", "| ratio | of medians | of minima | of peak memory |", "|---|---|---|---|"]
    for ratio in summary["ratios"]:
        memory = "-" if ratio["memory"] is None else f"{ratio['memory']:.2f}"
        pair = f"{ratio['of']} / {ratio['to']}"
        lines.append(f"| {pair} | {ratio['seconds']:.2f} | {ratio['minimum_seconds']:.2f} | {memory} |")
    return "\n".join(lines)


def rest(contender: Mapping[str, Any]) -> float:
    """Seconds of an iteration outside of its phases, median."""
    parts = zip(contender["seconds"], *contender["phases"].values(), strict=True)
    return median(seconds - sum(phases) for seconds, *phases in parts)


def target_lines(summary: Mapping[str, Any]) -> str:
    """Each target with what was measured."""
    lines = []
    for target in summary["targets"]:
        value = target["measured"]
        verdict = "not measured" if value is None else f"{value:.2f}, {'met' if target['met'] else 'missed'}"
        lines.append(f"{target['quantity']} of {target['of']} / {target['to']} at most {target['at_most']}: {verdict}")
    return "\n".join(lines)


def sweep_table(points: Sequence[Mapping[str, Any]]) -> str:
    """How time and memory grow, in Markdown."""
    lines = [
        "| prompts | new tokens | rto s | ms a token | rollout | scoring | update | floor s | rto / floor | peak GB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for point in points:
        contender, floor = point["summary"]["contenders"]["rto"], point["summary"]["floor"]["rto"]["median"]
        seconds = contender["median"]
        each = 1000 * seconds / (point["prompts"] * point["new_tokens"])
        phases = " | ".join(f"{part:.2f}" for part in contender["phase_medians"].values())
        lines.append(
            f"| {point['prompts']} | {point['new_tokens']} | {seconds:.2f} | {each:.1f} | {phases} | {floor:.2f} | "
            f"{seconds / floor:.2f} | {contender['memory']['peak'] / 1e9:.2f} |"
        )
    return "\n".join(lines)


def _ratio(
    name: str, other: str, seconds: Sequence[float], other_seconds: Sequence[float], memory: float | None
) -> dict[str, Any]:
    return {
        "of": name,
        "to": other,
        "seconds": median(seconds) / median(other_seconds),
        "minimum_seconds": min(seconds) / min(other_seconds),
        "memory": memory,
    }


def _target(
    ratios: Sequence[Mapping[str, Any]], name: str, other: str, quantity: str, at_most: float
) -> dict[str, Any]:
    measured = next((ratio[quantity] for ratio in ratios if (ratio["of"], ratio["to"]) == (name, other)), None)
    met = None if measured is None else measured <= at_most
    return {"of": name, "to": other, "quantity": quantity, "at_most": at_most, "measured": measured, "met": met}
