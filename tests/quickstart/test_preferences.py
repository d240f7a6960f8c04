"""Labels by the Bradley-Terry judge, and the preference file."""

import json
import math
import random
from pathlib import Path

import pytest

from rto_lightning.errors import UserError
from rto_lightning.quickstart.gold import gold_reward
from rto_lightning.quickstart.grammar import Message, Request, all_requests, parse_request, sample_review
from rto_lightning.quickstart.preferences import (
    label_pair,
    preference_probability,
    sample_preferences,
    write_preferences,
)

PROMPT = Request("kind", "small", "camera", "lens").messages
PROMPTS = [request.messages for request in all_requests()[::7]]


def grammar_sampler(seed: int):  # type: ignore[no-untyped-def]
    rng = random.Random(seed)

    def sample(prompts: list[list[Message]]) -> list[str]:
        return [sample_review(parse_request(prompt), rng) for prompt in prompts]

    return sample


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_labels_follow_bradley_terry(temperature: float) -> None:
    a, b = "the lens is great .", "the lens is quite okay ."
    difference = gold_reward(PROMPT, a) - gold_reward(PROMPT, b)
    probability = 1.0 / (1.0 + math.exp(-difference / temperature))
    rng = random.Random(0)
    count = 4000
    wins = sum(label_pair(PROMPT, a, b, rng, temperature).chosen == a for _ in range(count))
    error = math.sqrt(probability * (1.0 - probability) / count)
    assert wins / count == pytest.approx(probability, abs=4.0 * error)
    # The order in which the judge is shown the two does not matter.
    wins = sum(label_pair(PROMPT, b, a, rng, temperature).chosen == a for _ in range(count))
    assert wins / count == pytest.approx(probability, abs=4.0 * error)


def test_probabilities_at_the_extremes() -> None:
    assert preference_probability(1.0, 1.0) == 0.5
    assert preference_probability(1e6, -1e6, 1e-3) == 1.0
    assert preference_probability(-1e6, 1e6, 1e-3) == 0.0
    assert preference_probability(2.0, 1.0, 0.0) == 1.0
    assert preference_probability(1.0, 1.0, 0.0) == 0.5
    assert preference_probability(0.3, 1.1) + preference_probability(1.1, 0.3) == pytest.approx(1.0)


def test_the_margin_is_that_of_the_chosen_answer() -> None:
    a, b = "the lens is great .", "no comment ."
    margin = gold_reward(PROMPT, a) - gold_reward(PROMPT, b)
    pair = label_pair(PROMPT, b, a, random.Random(0), temperature=0.0)
    assert pair == (a, b, pytest.approx(margin))
    wrong = [label_pair(PROMPT, a, b, random.Random(seed), 50.0) for seed in range(50)]
    assert any(pair.chosen == b and pair.gold_margin == pytest.approx(-margin) for pair in wrong)


def test_the_judge_sees_the_gold_reward_that_is_asked_for() -> None:
    long, whole = (
        "the lens is superb and truly lovely . its screen is lovely .",
        "the lens is nice . its strap is nice .",
    )
    assert gold_reward(PROMPT, long) > gold_reward(PROMPT, whole)
    broken = f"{long} the motor is great ."
    assert gold_reward(PROMPT, broken) > gold_reward(PROMPT, whole)
    for texts in ((broken, whole), (whole, broken)):
        assert label_pair(PROMPT, *texts, random.Random(0), temperature=0.0).chosen == broken
        pair = label_pair(PROMPT, *texts, random.Random(0), temperature=0.0, gold="requirement")
        assert pair.chosen == whole
        assert pair.gold_margin == pytest.approx(3.0)

    def sample(prompts: list[list[Message]]) -> list[str]:
        return [broken] * (len(prompts) // 2) + [whole] * (len(prompts) // 2)

    for gold, chosen in (("sum", broken), ("requirement", whole)):
        rows = list(sample_preferences([PROMPT], sample, pairs=4, temperature=0.0, gold=gold))
        assert [row["chosen"] for row in rows] == [chosen] * 4


def test_each_prompt_is_used_once_before_any_is_used_twice() -> None:
    rows = list(sample_preferences(PROMPTS, grammar_sampler(0), pairs=40, seed=1, batch_size=16))
    assert len(rows) == 40
    prompts = [row["prompt"][0]["content"] for row in rows]  # type: ignore[index]
    assert len(set(prompts)) == 40
    many = list(sample_preferences(PROMPTS[:3], grammar_sampler(0), pairs=30, seed=1, batch_size=7))
    counts = [sum(row["prompt"] == prompt for row in many) for prompt in PROMPTS[:3]]
    assert sum(counts) == 30 and max(counts) - min(counts) <= 3


def test_preferences_are_decided_by_the_seed() -> None:
    def draw(seed: int) -> list[dict[str, object]]:
        return list(sample_preferences(PROMPTS, grammar_sampler(5), pairs=20, seed=seed))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_equal_and_empty_answers_are_dropped() -> None:
    def sample(prompts: list[list[Message]]) -> list[str]:
        half = len(prompts) // 2
        firsts = ["", "the lens is great .", "the case is okay ."]
        seconds = ["no comment .", "the lens is great .", "the case is awful ."]
        return [firsts[i % 3] for i in range(half)] + [seconds[i % 3] for i in range(half)]

    rows = list(sample_preferences(PROMPTS, sample, pairs=10, batch_size=9))
    assert len(rows) == 10
    assert all({row["chosen"], row["rejected"]} == {"the case is okay .", "the case is awful ."} for row in rows)


def test_a_policy_that_always_says_the_same_is_refused() -> None:
    with pytest.raises(UserError, match="train the SFT model longer"):
        list(sample_preferences(PROMPTS, lambda prompts: ["no comment ."] * len(prompts), pairs=5, batch_size=8))
    with pytest.raises(UserError, match="no prompts"):
        list(sample_preferences([], grammar_sampler(0), pairs=5))


def test_the_preference_file(tmp_path: Path) -> None:
    path = tmp_path / "preferences.jsonl"
    rows = list(sample_preferences(PROMPTS, grammar_sampler(0), pairs=5))
    assert write_preferences(path, rows) == 5
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    assert set(rows[0]) == {"prompt", "chosen", "rejected"}
    with pytest.raises(UserError, match=r"preferences\.jsonl is there already"):
        write_preferences(path, rows)


def test_pairs_that_fulfil_the_requirement_alike_are_dropped() -> None:
    """Of two answers of which none, one or both fulfil it, those with one are kept."""
    whole, broken = "the lens is nice . its strap is nice .", ("the lens is nice .", "the strap is nice .")
    rng = random.Random(0)

    def sample(prompts: list[list[Message]]) -> list[str]:
        return [rng.choice([whole, *broken]) for _ in prompts]

    rows = list(sample_preferences([PROMPT], sample, 40, temperature=0.0, gold="requirement"))
    assert len(rows) == 40
    assert {row["chosen"] for row in rows} == {whole}
    assert {row["rejected"] for row in rows} == set(broken)
