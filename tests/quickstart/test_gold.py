"""The gold reward, by hand."""

import random

import pytest

from rto_lightning.errors import UserError
from rto_lightning.quickstart import gold
from rto_lightning.quickstart.gold import STOP, TOKEN_COST, best_review, gold_reward, gold_token_rewards
from rto_lightning.quickstart.grammar import Request, all_requests, sample_review, words

KIND = Request("kind", "small", "camera", "lens").messages
SOBER = Request("sober", "red", "drill", "motor").messages
RIGHT_TELLING = gold.RIGHT_TONE + gold.TELLING


def weights(prompt: list[dict[str, str]], text: str) -> dict[str, float]:
    """Weights without the cost of a token, of words that occur once."""
    rewards = gold_token_rewards(prompt, text)
    return {token: weight + (0.0 if token == STOP else TOKEN_COST) for token, weight in rewards}


def test_one_weight_a_token_and_one_for_the_stop() -> None:
    text = "the lens is very superb . its strap looks awful ."
    rewards = gold_token_rewards(KIND, text)
    assert [token for token, _ in rewards] == [*words(text), STOP]
    expected = [0, gold.ASKED_ASPECT, 0, gold.FITTING_INTENSIFIER, RIGHT_TELLING, 0]
    expected += [0, gold.OTHER_ASPECT, 0, gold.WRONG_TONE + gold.VAGUE, 0]
    assert [weight for _, weight in rewards] == pytest.approx([*(value - TOKEN_COST for value in expected), 0.0])


def test_the_reward_is_the_sum() -> None:
    rng = random.Random(0)
    for request in rng.sample(all_requests(), 100):
        review = sample_review(request, rng)
        total = sum(weight for _, weight in gold_token_rewards(request.messages, review))
        assert gold_reward(request.messages, review) == pytest.approx(total)


@pytest.mark.parametrize(
    ("text", "token", "weight"),
    [
        ("the motor is great .", "motor", gold.FOREIGN_ASPECT),
        ("the motor is great .", "great", 0.0),
        ("it is great .", "great", gold.LOOSE_ADJECTIVE),
        ("the lens is nice lovely superb .", "superb", gold.LOOSE_ADJECTIVE),
        ("the lens is quite great .", "quite", gold.WRONG_INTENSIFIER),
        ("the lens is very really great .", "really", gold.WRONG_INTENSIFIER),
        ("very lens .", "very", gold.WRONG_INTENSIFIER),
        ("well , the lens is great .", "well", gold.FILLER),
        ("this camera is mine .", "camera", 0.0),
        ("this phone is mine .", "phone", gold.WRONG_PRODUCT),
        ("the lens is wonderful .", "wonderful", gold.UNKNOWN_WORD),
        ("the lens is great .", STOP, 0.0),
        ("the lens is great", STOP, gold.UNFINISHED),
        ("i use it .", STOP, gold.NOTHING_JUDGED),
    ],
)
def test_single_weights(text: str, token: str, weight: float) -> None:
    assert weights(KIND, text)[token] == pytest.approx(weight)


def test_what_is_said_again_costs() -> None:
    rewards = gold_token_rewards(KIND, "the lens is superb . the lens is superb . camera camera .")
    again = [weight + TOKEN_COST for token, weight in rewards if token in ("lens", "superb", "camera")]
    expected = [gold.ASKED_ASPECT, RIGHT_TELLING, gold.REPEATED_ASPECT, gold.REPEATED_ADJECTIVE]
    assert again == pytest.approx([*expected, 0.0, gold.WRONG_PRODUCT])


def test_tone_and_precision_add_up() -> None:
    expected = {
        "superb": gold.RIGHT_TONE + gold.TELLING,
        "nice": gold.RIGHT_TONE + gold.VAGUE,
        "modest": gold.WRONG_TONE + gold.TELLING,
        "bad": gold.WRONG_TONE + gold.VAGUE,
    }
    for adjective, weight in expected.items():
        assert weights(KIND, f"the battery is {adjective} .")[adjective] == pytest.approx(weight)
    assert weights(SOBER, "the motor is modest .")["modest"] == pytest.approx(gold.RIGHT_TONE + gold.TELLING)
    assert weights(SOBER, "the motor is quite modest .")["quite"] == gold.FITTING_INTENSIFIER


def test_the_empty_review_is_the_worst_short_one() -> None:
    assert gold_token_rewards(KIND, "") == [(STOP, gold.UNFINISHED + gold.NOTHING_JUDGED)]
    assert gold_reward(KIND, "") < gold_reward(KIND, "i use it .") < gold_reward(KIND, "the lens is great .")


def test_the_best_review_beats_the_grammar_by_several_standard_deviations() -> None:
    rng = random.Random(0)
    requests = all_requests()
    rewards = []
    for _ in range(4000):
        request = rng.choice(requests)
        rewards.append(gold_reward(request.messages, sample_review(request, rng)))
    mean = sum(rewards) / len(rewards)
    deviation = (sum((reward - mean) ** 2 for reward in rewards) / len(rewards)) ** 0.5
    best = [gold_reward(request.messages, best_review(request.messages)) for request in requests]
    assert max(best) == pytest.approx(min(best))
    assert best[0] > max(rewards)
    assert best[0] > mean + 3.0 * deviation


def test_more_words_than_the_best_review_has_only_cost() -> None:
    rng = random.Random(0)
    best = best_review(KIND, rng)
    top = gold_reward(KIND, best)
    others = [best_review(KIND, random.Random(seed)) for seed in range(5)]
    assert [gold_reward(KIND, other) for other in others] == pytest.approx([top] * 5)
    assert len(set(others)) > 1
    for extra in (
        "the lens is great .",
        "i use it every day .",
        "the motor is very kind .",
        "the strap is lovely .",
    ):
        assert gold_reward(KIND, f"{best} {extra}") < top
    assert gold_reward(KIND, f"{best} {best}") < top - 2.0


def test_a_prompt_from_elsewhere_has_no_gold_reward() -> None:
    with pytest.raises(UserError, match="has no gold reward"):
        gold_reward([{"role": "user", "content": "hello"}], "hello .")
