"""The gold reward of the quickstart: what a review is really worth, token by token.

The generator knows it, the learner never sees it: it labels the preferences and measures the results. It is a
sum over tokens. A token's weight depends on the prompt and on what was said before, as the reward of a
token-level Markov decision process may: the state is the prompt with what was said, the action the next
token. (`gold_requirement.py` has a second gold reward, which is no sum.)

What pays: naming each of the product's aspects once, the asked one above all, and judging it with one or two
telling adjectives of the asked tone, the first of them perhaps intensified. What costs: every token a little;
aspects that the product does not have, the wrong tone, vague words, repetition and fillers more; ending in
the middle of a sentence; and most of all a review that judges nothing.

The best review judges the product's four aspects and stops (see `best_review`): 26 tokens, worth 6.7. The
grammar's own reviews have 14 and are worth 0.0 in the mean, with a standard deviation of 1.4. Further words
only cost, so neither the longest nor the shortest answer is the best. (Dropping articles and verbs would save
their costs, about 0.6: the judge is no grammarian, and a fluent policy has little to win by broken English.)
"""

import random
from collections.abc import Sequence
from typing import Literal

from rto_lightning.quickstart.gold_requirement import FULFILLED, fulfils_requirement
from rto_lightning.quickstart.grammar import (
    ASPECTS,
    FILLERS,
    PRODUCTS,
    STRONG_INTENSIFIERS,
    TELLING_ADJECTIVES,
    TONE_OF_ADJECTIVE,
    VERBS,
    WEAK_INTENSIFIERS,
    Message,
    Request,
    fitting_intensifiers,
    parse_request,
    vocabulary,
    words,
)

GoldName = Literal["sum", "requirement"]
"""`sum`: the sum of `gold_token_rewards`. `requirement`: `FULFILLED` for a review that fulfils the requirement
(`fulfils_requirement`) and 0 for any other."""

STOP = "<|end|>"
"""The stop token, as it is called in the list of token rewards."""

TOKEN_COST = 0.05
"""Subtracted for every word and mark, and not for the stop."""
ASKED_ASPECT = 1.2
OTHER_ASPECT = 0.5
FOREIGN_ASPECT = -0.8
"""For an aspect that the product does not have."""
REPEATED_ASPECT = -0.5
RIGHT_TONE = 0.5
"""An adjective about an aspect that the product lacks, or that was named before, is worth nothing."""
WRONG_TONE = -0.5
TELLING = 0.4
"""Added to the tone's weight for a telling adjective."""
VAGUE = -0.4
"""Added to the tone's weight for a vague adjective."""
REPEATED_ADJECTIVE = -0.4
LOOSE_ADJECTIVE = -0.4
"""For an adjective that judges no aspect, or is the third about the same aspect."""
FITTING_INTENSIFIER = 0.2
WRONG_INTENSIFIER = -0.2
"""Also for a second intensifier about the same aspect, or one that no aspect precedes."""
WRONG_PRODUCT = -0.5
"""For naming another product, or the right one again."""
FILLER = -0.2
UNKNOWN_WORD = -0.5
UNFINISHED = -1.0
"""For a stop that does not follow a full stop."""
NOTHING_JUDGED = -2.0
"""For a stop before any aspect was named; an empty review earns both this and `UNFINISHED`."""

_INTENSIFIERS = frozenset(STRONG_INTENSIFIERS + WEAK_INTENSIFIERS)
_VOCABULARY = frozenset(vocabulary())


def gold_token_rewards(prompt_messages: Sequence[Message], response_text: str) -> list[tuple[str, float]]:
    """The gold weight of every token of a response, and of its stop.

    Args:
        prompt_messages: a prompt of the quickstart.
        response_text: the response without its stop token.

    Returns:
        (token, weight) for each word and mark of the response, in order, and last (`STOP`, weight). A
        response that was cut off is judged as if it stopped there.

    Raises:
        UserError: if the prompt is not one of the quickstart's.
    """
    state = _ReviewState(parse_request(prompt_messages))
    weights = [(token, state.read(token) - TOKEN_COST) for token in words(response_text)]
    return [*weights, (STOP, state.stop())]


def gold_reward(prompt_messages: Sequence[Message], response_text: str, gold: GoldName = "sum") -> float:
    """The gold reward of a response.

    Args:
        prompt_messages: a prompt of the quickstart.
        response_text: the response without its stop token.
        gold: which gold reward; see `GoldName`.

    Raises:
        UserError: if the prompt is not one of the quickstart's.
    """
    if gold == "sum":
        return sum(weight for _, weight in gold_token_rewards(prompt_messages, response_text))
    fulfilled = fulfils_requirement(parse_request(prompt_messages), words(response_text))
    return FULFILLED if fulfilled else 0.0


class _ReviewState:
    """What of a review's past decides the weight of its next token."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.named: set[str] = set()
        self.adjectives: set[str] = set()
        self.product_named = False
        self.last_token = ""
        # Of the aspect named last; None before the first.
        self.aspect: str | None = None
        self.aspect_counts = False
        self.aspect_adjectives = 0
        self.aspect_intensified = False

    def read(self, token: str) -> float:
        self.last_token = token
        if token in ASPECTS:
            return self._read_aspect(token)
        if token in TONE_OF_ADJECTIVE:
            return self._read_adjective(token)
        if token in _INTENSIFIERS:
            return self._read_intensifier(token)
        if token in PRODUCTS:
            fresh = token == self.request.product and not self.product_named
            self.product_named = True
            return 0.0 if fresh else WRONG_PRODUCT
        if token in FILLERS:
            return FILLER
        return 0.0 if token in _VOCABULARY else UNKNOWN_WORD

    def stop(self) -> float:
        return (0.0 if self.last_token == "." else UNFINISHED) + (0.0 if self.named else NOTHING_JUDGED)

    def _read_aspect(self, aspect: str) -> float:
        repeated = aspect in self.named
        self.named.add(aspect)
        self.aspect, self.aspect_adjectives, self.aspect_intensified = aspect, 0, False
        self.aspect_counts = not repeated and aspect in self.request.aspects
        if repeated:
            return REPEATED_ASPECT
        if aspect == self.request.asked:
            return ASKED_ASPECT
        return OTHER_ASPECT if self.aspect_counts else FOREIGN_ASPECT

    def _read_adjective(self, adjective: str) -> float:
        repeated = adjective in self.adjectives
        self.adjectives.add(adjective)
        self.aspect_adjectives += 1
        if repeated:
            return REPEATED_ADJECTIVE
        if self.aspect is None or self.aspect_adjectives > 2:
            return LOOSE_ADJECTIVE
        if not self.aspect_counts:
            return 0.0
        tone = TONE_OF_ADJECTIVE[adjective]
        telling = adjective in TELLING_ADJECTIVES[tone]
        return (RIGHT_TONE if tone == self.request.tone else WRONG_TONE) + (TELLING if telling else VAGUE)

    def _read_intensifier(self, intensifier: str) -> float:
        first = self.aspect is not None and not self.aspect_intensified
        self.aspect_intensified = True
        if not first:
            return WRONG_INTENSIFIER
        if not self.aspect_counts:
            return 0.0
        fits = intensifier in fitting_intensifiers(self.request.tone)
        return FITTING_INTENSIFIER if fits else WRONG_INTENSIFIER


def best_review(prompt_messages: Sequence[Message], rng: random.Random | None = None) -> str:
    """A review in the grammar's own sentences that is worth as much as any other of them.

    Each of the product's aspects, the asked one first, gets an intensified, telling adjective of the asked tone,
    and a second one as long as there are fresh ones. Words equal in worth are chosen by `rng`, or are the first
    of each list without one.
    """
    request = parse_request(prompt_messages)
    others = [aspect for aspect in request.aspects if aspect != request.asked]
    adjectives = list(TELLING_ADJECTIVES[request.tone])
    intensifiers = list(fitting_intensifiers(request.tone))
    verbs = list(VERBS)
    if rng is not None:
        for choices in (others, adjectives, intensifiers, verbs):
            rng.shuffle(choices)
    aspects = [request.asked, *others]
    sentences = []
    for index, aspect in enumerate(aspects):
        judgement = " and ".join(adjectives[index :: len(aspects)][:2])
        sentences.append(f"the {aspect} {verbs[0]} {intensifiers[0]} {judgement} .")
    return " ".join(sentences)
