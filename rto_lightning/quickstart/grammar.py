"""The grammar of the quickstart: requests for product reviews, and reviews that answer them, well or badly.

A request asks for a tone and for one aspect of a product in particular. A review is a few clauses that judge
aspects with adjectives. The grammar's reviews are mixed on purpose: they drift to aspects that the product
does not have, miss the tone, choose vague words, repeat themselves, or say nothing at all. So a model that
imitates them has much to gain, and every habit that the gold reward (`gold.py`) punishes occurs in the data
that a reward model sees.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rto_lightning.errors import UserError

Message = dict[str, str]

SIZES = ("small", "large", "old", "new", "cheap", "red", "blue", "used")
PRODUCTS: dict[str, tuple[str, ...]] = {
    "camera": ("lens", "screen", "battery", "strap"),
    "phone": ("screen", "battery", "speaker", "case"),
    "radio": ("speaker", "battery", "handle", "case"),
    "drill": ("motor", "battery", "handle", "manual"),
    "tablet": ("screen", "speaker", "case", "manual"),
    "projector": ("lens", "speaker", "motor", "manual"),
    "scooter": ("motor", "battery", "handle", "strap"),
    "telescope": ("lens", "case", "strap", "manual"),
}
# Telling adjectives say something about the thing; vague ones hardly do.
TELLING_ADJECTIVES: dict[str, tuple[str, ...]] = {
    "kind": ("superb", "lovely", "sturdy", "clever", "elegant"),
    "harsh": ("useless", "ugly", "flimsy", "stupid", "clumsy"),
    "sober": ("adequate", "standard", "practical", "ordinary", "modest"),
}
VAGUE_ADJECTIVES: dict[str, tuple[str, ...]] = {
    "kind": ("nice", "good", "great"),
    "harsh": ("bad", "poor", "awful"),
    "sober": ("okay", "usual", "passable"),
}
STRONG_INTENSIFIERS = ("very", "really", "truly")
WEAK_INTENSIFIERS = ("quite", "rather", "somewhat")
FILLERS = ("honestly", "frankly", "anyway", "well")
VERBS = ("is", "feels", "looks", "seems")
OPENINGS = ("i bought this {size} {product} .", "this {size} {product} is mine .")
CLOSINGS = ("that is all .", "i use it every day .", "i bought it last week .")
EMPTY_VERDICTS = ("it is {adjective} .", "i use it .", "no comment .", "well .", ".")

TONES = tuple(TELLING_ADJECTIVES)
ASPECTS = tuple(dict.fromkeys(aspect for aspects in PRODUCTS.values() for aspect in aspects))
TONE_OF_ADJECTIVE = {
    adjective: tone
    for pools in (TELLING_ADJECTIVES, VAGUE_ADJECTIVES)
    for tone, adjectives in pools.items()
    for adjective in adjectives
}

MAX_REVIEW_TOKENS = 30
_PROMPT = "write a {tone} review of the {size} {product} and its {asked}"
_PROMPT_PATTERN = re.compile(r"write a (\w+) review of the (\w+) (\w+) and its (\w+)")


@dataclass(frozen=True)
class Request:
    """What a prompt asks for."""

    tone: str
    """One of `TONES`."""
    size: str
    """One of `SIZES`; the gold reward ignores it."""
    product: str
    """A key of `PRODUCTS`."""
    asked: str
    """The aspect of the product that matters most."""

    @property
    def messages(self) -> list[Message]:
        """The prompt as a conversation of one user message."""
        content = _PROMPT.format(tone=self.tone, size=self.size, product=self.product, asked=self.asked)
        return [{"role": "user", "content": content}]

    @property
    def aspects(self) -> tuple[str, ...]:
        """The product's aspects, the asked one among them."""
        return PRODUCTS[self.product]


def parse_request(messages: Sequence[Message]) -> Request:
    """Read a prompt back.

    Raises:
        UserError: if the conversation is not one that `Request.messages` writes.
    """
    content = messages[-1]["content"] if messages else ""
    match = _PROMPT_PATTERN.fullmatch(content)
    if match is not None:
        tone, size, product, asked = match.groups()
        if tone in TONES and size in SIZES and asked in PRODUCTS.get(product, ()):
            return Request(tone, size, product, asked)
    raise UserError(
        f"The prompt {content!r} is not one of the quickstart's, so it has no gold reward; "
        "take prompts from the files that the world stage writes."
    )


def all_requests() -> list[Request]:
    """Every request there is, in a fixed order: 8 products x 4 aspects x 3 tones x 8 sizes = 768."""
    return [
        Request(tone, size, product, asked)
        for product, aspects in PRODUCTS.items()
        for asked in aspects
        for tone in TONES
        for size in SIZES
    ]


def words(text: str) -> list[str]:
    """Split text as the quickstart's tokenizer does: lower case, words and single punctuation marks."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def fitting_intensifiers(tone: str) -> tuple[str, ...]:
    """Strong intensifiers for the kind and the harsh tone, weak ones for the sober tone."""
    return WEAK_INTENSIFIERS if tone == "sober" else STRONG_INTENSIFIERS


def sample_review(request: Request, rng: random.Random) -> str:
    """One review of the grammar: 1 to `MAX_REVIEW_TOKENS` tokens, 14 in the mean, separated by blanks."""
    if rng.random() < 0.1:
        return rng.choice(EMPTY_VERDICTS).format(adjective=_sample_adjective(_sample_tone(request, rng), rng))
    # A review that came out too long is drawn again: cutting it would end it in the middle of a sentence.
    while True:
        review = _sample_clauses(request, rng)
        if len(review.split()) <= MAX_REVIEW_TOKENS:
            return review


def _sample_clauses(request: Request, rng: random.Random) -> str:
    clause_count = rng.choices((1, 2, 3, 4), weights=(0.28, 0.37, 0.25, 0.10))[0]
    parts: list[str] = []
    if rng.random() < 0.15:
        parts.append(rng.choice(OPENINGS).format(size=request.size, product=request.product))
    for number in range(clause_count):
        parts.append(_sample_clause(request, rng))
        is_last = number == clause_count - 1
        parts.append("." if is_last else rng.choice((".", ".", ", and", ", but")))
    if rng.random() < 0.15:
        parts.append(rng.choice(CLOSINGS))
    return " ".join(parts)


def _sample_clause(request: Request, rng: random.Random) -> str:
    drift = rng.random()
    if drift < 0.25:
        aspect = request.asked
    elif drift < 0.8:
        aspect = rng.choice(request.aspects)
    else:
        aspect = rng.choice(ASPECTS)
    # A clause keeps to one tone.
    tone = _sample_tone(request, rng)
    clause = [f"{rng.choice(FILLERS)} ,"] if rng.random() < 0.12 else []
    clause += [rng.choice(("the", "its")), aspect, rng.choice(VERBS), _sample_judgement(tone, rng)]
    if rng.random() < 0.35:
        clause += ["and", _sample_judgement(tone, rng)]
    return " ".join(clause)


def _sample_tone(request: Request, rng: random.Random) -> str:
    if rng.random() < 0.5:
        return request.tone
    return rng.choice(TONES)


def _sample_adjective(tone: str, rng: random.Random) -> str:
    pools = TELLING_ADJECTIVES if rng.random() < 0.5 else VAGUE_ADJECTIVES
    return rng.choice(pools[tone])


def _sample_judgement(tone: str, rng: random.Random) -> str:
    adjective = _sample_adjective(tone, rng)
    if rng.random() < 0.35:
        return f"{rng.choice(STRONG_INTENSIFIERS + WEAK_INTENSIFIERS)} {adjective}"
    return adjective


def vocabulary() -> list[str]:
    """Every word and mark of prompts and reviews, sorted."""
    templates = " ".join((*OPENINGS, *CLOSINGS, *EMPTY_VERDICTS, _PROMPT))
    spoken = words(re.sub(r"\{\w+\}", " ", templates))
    inflected = (
        *TONES,
        *TONE_OF_ADJECTIVE,
        *SIZES,
        *PRODUCTS,
        *ASPECTS,
        *STRONG_INTENSIFIERS,
        *WEAK_INTENSIFIERS,
        *FILLERS,
        *VERBS,
    )
    return sorted({*spoken, *inflected, "the", "its", "and", "but", ",", "."})
