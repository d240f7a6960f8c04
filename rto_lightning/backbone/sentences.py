"""Where sentences end in responses: the tokens that Semi-RTO moves its rewards to."""

import re
from bisect import bisect_right
from codecs import getincrementaldecoder
from functools import cache, lru_cache
from itertools import accumulate

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_MARKS, _WIDE_MARKS, _CLOSING = r".!?…", r"。！？", r"""\"'”’»)\]}」』）】》"""
_END = re.compile(
    # Before white space, what opens elsewhere closes: German writes „so.“ and »so.«, Markdown **so.**
    rf"[{_MARKS}]+[{_CLOSING}“«*]*(?=\s|\Z)"
    # Chinese and Japanese write no space behind a mark.
    rf"|[{_MARKS}]*[{_WIDE_MARKS}][{_MARKS}{_WIDE_MARKS}]*[{_CLOSING}]*"
    r"|[\r\n]+"
)
_INCOMPLETE = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def sentence_ends(tokenizer: PreTrainedTokenizerBase, response_ids: Tensor, mask: Tensor) -> Tensor:
    r"""The tokens that end a sentence, found on the text of each response.

    A sentence ends with

    - one or more of ``. ! ? …``, with the closing quotes, brackets and asterisks that follow, before white space or at
      the end of the response: ``3.14`` ends nothing, ``...`` once;
    - one or more of ``。 ！ ？``, with the closing quotes and brackets that follow, whatever comes then;
    - one or more line breaks, also right after a mark.

    Abbreviations and numbered lists are not told apart: ``e.g.`` and ``1.`` before a blank count. The token that
    carries the last character of an end is marked; of a character that is split over tokens, the one that completes it.
    Special tokens have no text.

    Args:
        tokenizer: Its texts of single tokens are kept for the next call.
        response_ids: int64, shape ``(B, T)``.
        mask: Boolean, True on the tokens of the responses; shape ``(B, T)``.

    Returns:
        Boolean, shape ``(B, T)``, False outside the mask. The last token of a response is not marked for being last.
    """
    vocabulary = token_bytes(tokenizer)
    ends = torch.zeros(mask.shape, dtype=torch.bool)
    for row, (ids, valid) in enumerate(zip(response_ids.cpu(), mask.cpu(), strict=True)):
        decoder = getincrementaldecoder("utf-8")(errors="replace")
        texts = [decoder.decode(vocabulary[token]) for token in ids[valid].tolist()]
        last_characters = [match.end() - 1 for match in _END.finditer("".join(texts))]
        lengths = list(accumulate(map(len, texts)))
        marked = [bisect_right(lengths, character) for character in last_characters]
        ends[row, valid.nonzero().squeeze(1)[marked]] = True
    return ends.to(response_ids.device)


class _TokenBytes(dict[int, bytes]):
    """What each token adds to the text, in UTF-8, looked up when it is first asked for.

    Decoding one token by itself does not tell: SentencePiece drops the first blank, and a tokenizer of words puts
    blanks only between tokens. So it is decoded behind another token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        special = (token for token, added in tokenizer.added_tokens_decoder.items() if added.special)
        self.update(dict.fromkeys([*special, *tokenizer.all_special_ids], b""))
        self.before = next(
            [token]
            for token in range(len(tokenizer))
            if token not in self and self._decode([token]).strip(f"{_INCOMPLETE} \n")
        )
        self.skip = len(self._decode(self.before))

    def __missing__(self, token: int) -> bytes:
        text = self._decode([*self.before, token])[self.skip :]
        added = text.encode()
        if _INCOMPLETE in text:
            spelling: str = self.tokenizer.convert_ids_to_tokens(token)  # type: ignore[assignment]
            added = _part_of_character(spelling) or added
        self[token] = added
        return added

    def _decode(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(  # type: ignore[assignment]
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


@lru_cache(maxsize=4)
def token_bytes(tokenizer: PreTrainedTokenizerBase) -> _TokenBytes:
    """What each id of a tokenizer adds to the text, in UTF-8; nothing for special tokens."""
    return _TokenBytes(tokenizer)


def _part_of_character(token: str) -> bytes | None:
    """The bytes of a token that holds a part of a character, in either of the spellings that vocabularies have."""
    if byte := _BYTE_TOKEN.fullmatch(token):
        return bytes.fromhex(byte[1])
    byte_of = _byte_level_alphabet()
    return bytes(byte_of[character] for character in token) if byte_of.keys() >= set(token) else None


@cache
def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable bytes are themselves, the others follow in order from U+0100 on."""
    alphabet = sorted(ByteLevel.alphabet())
    byte_of = {character: ord(character) for character in alphabet if ord(character) < 256}
    others = sorted(set(range(256)) - set(byte_of.values()))
    return byte_of | dict(zip(alphabet[len(byte_of) :], others, strict=True))
