"""A gold reward that is no sum: a review is worth something only if, as a whole, it does what was asked.

There is no credit for a part of it. What a token is worth is known when the review is whole and not before, so that
no reward for single tokens can be right. About one in ten of the grammar's own reviews fulfils the requirement.
"""

from collections.abc import Sequence

from rto_lightning.quickstart.grammar import ASPECTS, TONE_OF_ADJECTIVE, Request

FULFILLED = 3.0
"""What a review earns that fulfils the requirement. Tokens cost nothing: a cost is so much easier to learn than the
requirement that a policy would only learn to be short."""


def fulfils_requirement(request: Request, tokens: Sequence[str]) -> bool:
    """Whether a review does all of this.

    It judges the asked aspect and at least one other of the product's aspects, that is, an adjective comes after
    the aspect's name and before another aspect is named; it names no aspect that the product lacks; every adjective
    is of the asked tone; and it ends with a full stop.

    Args:
        request: what was asked for.
        tokens: words and marks of the review, without its stop token.
    """
    judged: set[str] = set()
    aspect: str | None = None
    for token in tokens:
        if token in ASPECTS:
            if token not in request.aspects:
                return False
            aspect = token
        elif token in TONE_OF_ADJECTIVE:
            if TONE_OF_ADJECTIVE[token] != request.tone:
                return False
            if aspect is not None:
                judged.add(aspect)
    return request.asked in judged and len(judged) >= 2 and tokens[-1] == "."
