"""The text that each token of a response adds, and which tokens have to be shown together."""

import unicodedata
from codecs import getincrementaldecoder
from collections.abc import Callable, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from rto_lightning.backbone.sentences import token_bytes

_JOINER = "\u200d"
_SKIN_TONES = range(0x1F3FB, 0x1F400)


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> tuple[list[str], list[bool]]:
    """What each of T tokens adds to the text, and whether it is a special token, which stands by its name.

    The bytes of a character may be spread over tokens: the one that completes it has it, the others are empty. What is
    never completed is one U+FFFD at its last token.

    Args:
        tokenizer: that of the response.
        token_ids: T ids without padding.
    """
    vocabulary = token_bytes(tokenizer)
    decoder = getincrementaldecoder("utf-8")(errors="replace")
    texts: list[str] = []
    special: list[bool] = []
    for token in token_ids:
        added = vocabulary[token]
        special.append(not added)
        if added:
            texts.append(decoder.decode(added))
            continue
        _complete(texts, decoder.decode(b"", final=True))
        decoder.reset()
        texts.append(str(tokenizer.convert_ids_to_tokens(token)))
    _complete(texts, decoder.decode(b"", final=True))
    return texts, special


def _complete(texts: list[str], rest: str) -> None:
    if rest:
        texts[-1] += rest


class Span(NamedTuple):
    """Tokens `start` to `end` (excluded) that are shown together, since none of them can be shown alone."""

    text: str
    start: int
    end: int


def spans(texts: Sequence[str], special: Sequence[bool]) -> list[Span]:
    """The tokens of a response, put together where one alone is no character or only a part of what is seen as one.

    Args:
        texts: what each of T tokens adds, as by :func:`token_texts`.
        special: T flags; special tokens stand alone.
    """
    characters = _join(
        [Span(text, index, index + 1) for index, text in enumerate(texts)], special, lambda before, text: not before
    )
    return _join(characters, special, _continues)


def _join(parts: list[Span], special: Sequence[bool], together: Callable[[str, str], bool]) -> list[Span]:
    """Neighbours put together where `together` says so of their texts; special tokens stand alone."""
    joined: list[Span] = []
    for text, start, end in parts:
        before = joined[-1] if joined else None
        if before is not None and not special[start] and not special[before.start] and together(before.text, text):
            joined[-1] = Span(before.text + text, before.start, end)
        else:
            joined.append(Span(text, start, end))
    return joined


def _continues(before: str, text: str) -> bool:
    """Whether a text belongs to the character with which the text before it ends."""
    first = text[:1]
    if before.endswith(_JOINER) or first == _JOINER:
        return True
    return bool(first) and (unicodedata.category(first)[0] == "M" or ord(first) in _SKIN_TONES)
