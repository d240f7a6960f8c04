"""The gold reward that is no sum."""

import itertools
import random

import pytest

from rto_lightning.errors import UserError
from rto_lightning.quickstart.gold import GoldName, best_review, gold_reward
from rto_lightning.quickstart.gold_requirement import FULFILLED, fulfils_requirement
from rto_lightning.quickstart.grammar import ASPECTS, TONES, Request, all_requests, sample_review, words

REQUEST = Request("kind", "small", "camera", "lens")
KIND = REQUEST.messages
OTHER_TONE = {"kind": "ugly", "harsh": "modest", "sober": "superb"}


@pytest.mark.parametrize(
    ("text", "fulfilled"),
    [
        ("the lens is superb . the strap is nice .", True),
        ("its strap is very nice , and the lens looks great and lovely .", True),
        ("strap nice lens good .", True),
        ("the lens feels . it is superb . i bought a strap . it is nice .", True),  # about the aspect named last
        ("the lens is superb .", False),  # one aspect only
        ("the strap is superb . the battery is nice .", False),  # not the asked one
        ("the lens is superb . the strap is .", False),  # named, not judged
        ("the lens and the strap are superb .", False),
        ("superb lens . nice strap .", False),  # the adjective before the last aspect is about the first
        ("the lens is superb . the lens is nice .", False),
        ("the lens is superb . the strap is nice . the motor is great .", False),  # a camera has no motor
        ("the lens is superb . the motor is nice .", False),
        ("the lens is superb . the strap is okay .", False),
        ("the lens is superb and ugly . the strap is nice .", False),
        ("ugly . the lens is superb . the strap is nice .", False),
        ("the lens is superb . the strap is nice", False),
        ("", False),
        (".", False),
    ],
)
def test_single_reviews(text: str, fulfilled: bool) -> None:
    assert fulfils_requirement(REQUEST, words(text)) == fulfilled
    assert gold_reward(KIND, text, "requirement") == (FULFILLED if fulfilled else 0.0)


def test_the_best_review_of_every_prompt_fulfils_it() -> None:
    requests = all_requests()
    assert all(fulfils_requirement(request, words(best_review(request.messages))) for request in requests)


def test_one_wrong_word_loses_everything() -> None:
    """Of a review that fulfils it, and has no credit left after any one of these changes."""
    for request in random.Random(0).sample(all_requests(), 50):
        review = best_review(request.messages).split()
        foreign = next(aspect for aspect in ASPECTS if aspect not in request.aspects)
        asked = review.index(request.asked)
        broken = [
            [*review, "the", foreign, "."],
            [*review[:-1], OTHER_TONE[request.tone], "."],
            review[:-1],
            [*review[:asked], *review[asked + 1 :]],
        ]
        for tokens in broken:
            assert gold_reward(request.messages, " ".join(tokens), "requirement") == 0.0


def test_between_4_and_12_of_100_reviews_of_the_grammar_fulfil_it() -> None:
    rng = random.Random(0)
    requests = all_requests()
    drawn = [rng.choice(requests) for _ in range(6000)]
    fulfilled = [fulfils_requirement(request, words(sample_review(request, rng))) for request in drawn]
    assert 0.04 < sum(fulfilled) / len(fulfilled) < 0.12
    for tone in TONES:
        share = [done for request, done in zip(drawn, fulfilled, strict=True) if request.tone == tone]
        assert 0.04 < sum(share) / len(share) < 0.14


def exchange(gold: GoldName, beginnings: tuple[str, str], ends: tuple[str, str]) -> float:
    """r(a, c) + r(b, d) - r(a, d) - r(b, c): 0 for every sum of a beginning's worth and an end's."""
    worth = {pair: gold_reward(KIND, " ".join(pair), gold) for pair in itertools.product(beginnings, ends)}
    (a, b), (c, d) = beginnings, ends
    return worth[a, c] + worth[b, d] - worth[a, d] - worth[b, c]


def test_it_is_no_sum_of_what_the_parts_are_worth() -> None:
    beginnings, ends = ("the lens is superb .", "the lens is ."), ("the strap is nice .", "the strap is .")
    assert exchange("sum", beginnings, ends) == pytest.approx(0.0)
    assert exchange("requirement", beginnings, ends) == pytest.approx(FULFILLED)
    # An end that costs a bad beginning nothing spoils a good one.
    beginnings, ends = ("the lens is superb . the strap is nice .", "the lens is ."), ("that is all .", "it is ugly .")
    assert exchange("requirement", beginnings, ends) == pytest.approx(FULFILLED)


def test_a_prompt_from_elsewhere_has_no_gold_reward() -> None:
    with pytest.raises(UserError, match="has no gold reward"):
        gold_reward([{"role": "user", "content": "hello"}], "hello .", "requirement")
