"""The tokens by which a chat is structured, and texts that spell them.

A tokenizer finds its control tokens (`<|im_end|>`) in any text, so that whoever writes a prompt could end a turn and
begin another. Conversations that spell none are encoded as they are. In the others the first letters of control tokens
are hidden in the messages, by characters of no meaning, while the template is rendered; what is found then is the
template's own, and the text between is encoded without control tokens.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

_PRIVATE_USE = range(0xF0000, 0xFFFFE)
"""Characters without a meaning, the last ones that a text or a template would hold."""


class ControlTokens:
    """The control tokens of a tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer.
        tokens: the control tokens with their ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: Mapping[str, int]) -> None:
        self.ids = {text: index for text, index in tokens.items() if text}
        added: Any = tokenizer.added_tokens_decoder
        spaces = {token.content: (token.lstrip, token.rstrip) for token in added.values()}
        names = sorted(self.ids, key=len, reverse=True)  # as tokenizers do, the longest of several
        self._spelled = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._written = re.compile(
            "|".join(_with_spaces(name, *spaces.get(name, (False, False))) for name in names) or r"(?!)"
        )
        self._tokenizer = tokenizer
        # Some tokens are found in a text only after it was normalised, as full-width letters are.
        self._found_normalized = any(token.normalized and token.content in self.ids for token in added.values())

    def spelled_in(self, messages: Sequence[Mapping[str, str]]) -> bool:
        """Whether one of some messages, or several of them put together, spells a control token."""
        text = "".join(message.get(key, "") for key in ("content", "role") for message in messages)
        if self._spelled.search(text):
            return True
        backend: Any = getattr(self._tokenizer, "backend_tokenizer", None) if self._found_normalized else None
        normalizer = getattr(backend, "normalizer", None)
        return normalizer is not None and bool(self._spelled.search(normalizer.normalize_str(text)))

    def hide(self, messages: Sequence[Mapping[str, str]], template: str) -> tuple[list[dict[str, str]], dict[int, str]]:
        """Messages in which no control token is spelled any more.

        Args:
            messages: the turns of a chat.
            template: text whose characters do not stand for others.

        Returns:
            The messages; and what turns characters back, for `str.translate`.
        """
        taken = {*template, *(letter for message in messages for text in message.values() for letter in text)}
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in taken)
        hidden = {name[0]: next(free) for name in self.ids}
        table = str.maketrans(hidden)
        back = {ord(letter): first for first, letter in hidden.items()}
        return [{key: text.translate(table) for key, text in message.items()} for message in messages], back

    def split(self, rendered: str) -> list[int | str]:
        """The control tokens in a text of a template as ids, and the text between them."""
        parts: list[int | str] = []
        end = 0
        for match in self._written.finditer(rendered):
            if match.start() > end:
                parts.append(rendered[end : match.start()])
            parts.append(self.ids[next(text for text in match.groups() if text is not None)])
            end = match.end()
        return [*parts, rendered[end:]] if end < len(rendered) else parts


class PlainMarks:
    """What a template writes between two turns without a control token: texts can spell it too.

    Args:
        marks: such as `[/INST]`.
        name: of the tokenizer.
    """

    def __init__(self, marks: Iterable[str], name: str) -> None:
        self.marks = tuple(dict.fromkeys(marks))
        self.name = name
        self.texts = 0
        """How many texts so far spelled one."""

    def look_for(self, texts: Iterable[str]) -> None:
        """Count texts that spell one, and warn of the first, the tenth, the hundredth and so on."""
        for text in texts if self.marks else ():
            mark = next((mark for mark in self.marks if mark in text), None)
            if mark is None:
                continue
            self.texts += 1
            if str(self.texts).rstrip("0") == "1":
                _log.warning(
                    "%d text(s) so far spell %r, the plain text by which the chat template of %s marks a turn: a model "
                    "cannot tell them apart.",
                    self.texts,
                    mark,
                    self.name,
                )


def _with_spaces(name: str, before: bool, after: bool) -> str:
    """A token in a text, which may take the white space around it away."""
    return r"\s*" * before + f"({re.escape(name)})" + r"\s*" * after
