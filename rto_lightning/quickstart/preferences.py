"""Preferences over answers of a policy, labelled by a Bradley-Terry judge who sees the gold reward."""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rto_lightning.errors import UserError
from rto_lightning.quickstart.gold import GoldName, gold_reward
from rto_lightning.quickstart.grammar import Message
from rto_lightning.quickstart.jsonl import write_jsonl

SampleAnswers = Callable[[list[list[Message]]], list[str]]
"""Takes B prompts and returns B responses, without their stop tokens."""


class LabelledPair(NamedTuple):
    """Two answers to one prompt, put in order by the judge."""

    chosen: str
    rejected: str
    gold_margin: float
    """Gold reward of the chosen answer minus that of the rejected one; negative where the judge erred."""


def preference_probability(gold_a: float, gold_b: float, temperature: float = 1.0) -> float:
    """Bradley-Terry: P(a before b) = sigmoid((gold_a - gold_b) / temperature); temperature 0 never errs."""
    difference = gold_a - gold_b
    if temperature == 0.0:
        return 0.5 if difference == 0.0 else float(difference > 0.0)
    # tanh does not overflow where exp does.
    return 0.5 * (1.0 + math.tanh(0.5 * difference / temperature))


def label_pair(
    prompt: Sequence[Message],
    a: str,
    b: str,
    rng: random.Random,
    temperature: float = 1.0,
    gold: GoldName = "sum",
) -> LabelledPair:
    """Let the judge choose between two answers.

    Args:
        prompt: a prompt of the quickstart.
        a: an answer.
        b: another answer.
        rng: source of the judge's errors.
        temperature: how much the judge errs; see `preference_probability`.
        gold: which gold reward the judge sees.
    """
    gold_a, gold_b = gold_reward(prompt, a, gold), gold_reward(prompt, b, gold)
    if rng.random() < preference_probability(gold_a, gold_b, temperature):
        return LabelledPair(a, b, gold_a - gold_b)
    return LabelledPair(b, a, gold_b - gold_a)


def sample_preferences(
    prompts: Sequence[list[Message]],
    sample: SampleAnswers,
    pairs: int,
    seed: int = 1,
    temperature: float = 1.0,
    batch_size: int = 256,
    gold: GoldName = "sum",
) -> Iterator[dict[str, object]]:
    """Sample two answers for a prompt, again and again, and label each pair.

    Prompts are used in shuffled order, each once before any is used twice. Pairs of equal answers and pairs
    with an empty answer are dropped: they say nothing, or are no row of a preference file. With gold reward
    `requirement` so are pairs of which both answers fulfil it, or neither: most pairs, whose label would be a coin's.

    Args:
        prompts: prompts to draw from.
        sample: draws one answer for each of a list of prompts; see `SampleAnswers`.
        pairs: how many pairs to yield.
        seed: seed of the order of prompts and of the judge.
        temperature: see `preference_probability`.
        batch_size: pairs asked of `sample` at once, as twice as many prompts.
        gold: which gold reward the judge sees.

    Yields:
        Rows `{"prompt": messages, "chosen": text, "rejected": text}`.

    Raises:
        UserError: if there are no prompts, or nearly every pair has to be dropped.
    """
    if not prompts:
        raise UserError("There are no prompts to sample preferences for; name a file with at least one.")
    order_rng, judge = random.Random(f"order {seed}"), random.Random(f"judge {seed}")
    order: list[int] = []
    drawn = kept = 0
    # Always a whole batch: dropped pairs would else leave a tail of ever smaller ones.
    wanted = min(batch_size, pairs)
    while kept < pairs:
        if drawn > 20 * (pairs + batch_size):
            raise UserError(
                f"Of {drawn} sampled pairs only {kept} hold two different, non-empty answers; "
                "train the SFT model longer, or raise the sampling temperature."
            )
        while len(order) < wanted:
            order.extend(order_rng.sample(range(len(prompts)), len(prompts)))
        batch = [prompts[index] for index in order[:wanted]]
        del order[:wanted]
        answers = sample([*batch, *batch])
        drawn += wanted
        for prompt, a, b in zip(batch, answers[:wanted], answers[wanted:], strict=True):
            if a == b or not a.strip() or not b.strip():
                continue
            if kept == pairs:
                return
            pair = label_pair(prompt, a, b, judge, temperature, gold)
            if gold == "requirement" and pair.gold_margin == 0:
                continue
            kept += 1
            yield {"prompt": prompt, "chosen": pair.chosen, "rejected": pair.rejected}


def write_preferences(path: str | Path, rows: Iterable[dict[str, object]]) -> int:
    """Write preference rows as JSONL and return how many there were.

    Raises:
        UserError: if the file exists.
    """
    return write_jsonl(path, rows)
