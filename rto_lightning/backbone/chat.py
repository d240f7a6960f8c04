"""The one place where messages become tokens and tokens become text.

Conventions, for every stage and every data set:

- A prompt is the chat template, rendered once with the generation prompt and encoded without further special
  tokens: the only BOS is the template's.
- A response is its content plus exactly one stop id, which is what a rollout would sample. What the template
  writes after the stop (SmolLM2 writes a newline) is not part of it. What it writes between the generation
  prompt and the content (Qwen3's empty thinking block, Llama 2's space) is.
- A response that is cut at its limit carries no stop id.
- Text of a message or a response never becomes a control token, whatever it spells: neither a special token or a stop
  nor another token by which the template marks a turn. What a template marks by plain text (`[/INST]`) can be spelled;
  such texts are counted and warned of.
"""

import hashlib
import logging
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rto_lightning.backbone.control_tokens import ControlTokens, PlainMarks
from rto_lightning.errors import UserError

_log = logging.getLogger(__name__)

Message = dict[str, str]
"""One turn of a chat: `{"role": "system" | "user" | "assistant", "content": text}`."""

PLAIN = "plain"
"""The value of `chat_template` that means: no template, message contents as they are."""

_PROBE = "Probe"


class ChatTokenizer:
    """Encodes prompts and responses of one tokenizer, and decodes responses.

    Args:
        tokenizer: A Hugging Face tokenizer. When `chat_template` overrides its template, the new one is
            stored on it, so that a saved model carries the template it was trained with.
        generation_config_stop_ids: The `eos_token_id` entries of the model's generation config.
        chat_template: None for the tokenizer's own; `plain` for message contents joined by newlines; or the
            path of a file with a Jinja template, or the Jinja text itself.
        name: What to call the tokenizer in errors; the default is the name it was loaded by.

    Raises:
        UserError: If there is no template, it is not one or it does not render, or if no stop token is known.
    """

    tokenizer: PreTrainedTokenizerBase
    """The Hugging Face tokenizer."""
    stop_ids: tuple[int, ...]
    """Ids that end a response; the first is the one that encoded responses carry."""
    pad_id: int
    """Fills padding. Often a stop id too, so it never decides a mask."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        generation_config_stop_ids: Iterable[int] = (),
        chat_template: str | None = None,
        name: str = "",
    ) -> None:
        self.tokenizer = tokenizer
        self.name = name or tokenizer.name_or_path or type(tokenizer).__name__
        self.plain = chat_template == PLAIN
        if chat_template is not None:  # what is saved has the template that was trained with, or none
            tokenizer.chat_template = None if self.plain else _read_template(chat_template)
        if not self.plain and not tokenizer.chat_template:
            raise UserError(
                f"The tokenizer of {self.name} has no chat template; set model.backbone.chat_template to a "
                f"Jinja file or to `{PLAIN}`."
            )
        prefix, suffix = ("", "") if self.plain else self._probe_template()
        self.stop_ids = self._find_stop_ids(suffix, generation_config_stop_ids)
        self.pad_id = self.stop_ids[0] if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        self._control, self._plain_marks = self._find_control_tokens()
        # An unknown word is not an attempt to spell a special token.
        self._forbidden_ids = {*self._control.ids.values()} - {tokenizer.unk_token_id}
        self._anchor_ids = self._find_anchor()
        # The content is encoded together with the plain text before it (Llama 2's space joins the first
        # word), the special tokens in front of that on their own.
        cut = max((prefix.rfind(t) + len(t) for t in self._special_tokens if t in prefix), default=0)
        self._prefix_ids = self._encode(prefix[:cut])
        self._prefix_text = prefix[cut:]

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that two tokenizers share exactly if their vocabularies are the same."""
        vocabulary = sorted((token, index) for token, index in self.tokenizer.get_vocab().items())
        return hashlib.sha256(repr(vocabulary).encode()).hexdigest()[:16]

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation up to and with the generation prompt.

        Args:
            messages: The turns so far; the last one is to be answered.

        Raises:
            UserError: If the chat template refuses the messages.
        """
        return self.encode_prompts([messages])[0]

    def encode_prompts(self, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
        """`encode_prompt` for many conversations, faster than one by one."""
        if not conversations:
            return []
        self._plain_marks.look_for(message["content"] for messages in conversations for message in messages)
        spelled = [self._control.spelled_in(messages) for messages in conversations]
        harmless = [messages for messages, guard in zip(conversations, spelled, strict=True) if not guard]
        encoded = iter(self._encode_all([self.render_prompt(messages) for messages in harmless]))
        rows = [
            self._encode_guarded(messages) if guard else next(encoded)
            for messages, guard in zip(conversations, spelled, strict=True)
        ]
        if self.plain and self._adds_bos:
            bos = self.tokenizer.bos_token_id
            rows = [row if row[:1] == [bos] else [bos, *row] for row in rows]
        return rows

    def render_prompt(self, messages: Sequence[Message]) -> str:
        """The text of a conversation up to and with the generation prompt; `encode_prompt` gives its ids."""
        if self.plain:
            return "\n".join(message["content"] for message in messages)
        return self._render(messages, add_generation_prompt=True)

    def encode_response(self, text: str, max_tokens: int) -> list[int]:
        """The ids of a response: its content and one stop id, or its first `max_tokens` ids without a stop.

        Args:
            text: The answer as its author wrote it, without any special token.
            max_tokens: The most ids to return, the stop included.
        """
        return self.encode_responses([text], max_tokens)[0]

    def encode_responses(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """`encode_response` for many texts, faster than one by one."""
        self._plain_marks.look_for(texts)
        contents = self._encode_contents([self._prefix_text + text for text in texts])
        rows = [[*self._prefix_ids, *content, self.stop_ids[0]] for content in contents]
        # The cut falls before the stop, so a row that is too long loses it.
        return [row[:max_tokens] for row in rows]

    def decode_response(self, ids: Sequence[int] | Tensor) -> str:
        """The text of a response, without its stop id, special tokens and the template's prefix.

        Args:
            ids: (length,) ids of one response, without padding.
        """
        row = [int(i) for i in ids]
        if row and row[-1] in self.stop_ids:
            row = row[:-1]
        if self._prefix_ids and row[: len(self._prefix_ids)] == self._prefix_ids:
            row = row[len(self._prefix_ids) :]
        text = self.tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text.removeprefix(self._prefix_text)

    # How the template and the tokenizer behave, found once at the start.

    @cached_property
    def _special_tokens(self) -> dict[str, int]:
        named = dict(zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True))
        added = self.tokenizer.added_tokens_decoder
        return named | {token.content: int(i) for i, token in added.items() if token.special}

    def _probe_template(self) -> tuple[str, str]:
        """What the template writes before and after an answer's content."""
        prompt: list[Message] = [{"role": "user", "content": "Question"}]
        answered = [*prompt, {"role": "assistant", "content": _PROBE}]
        rendered = self._render(answered, add_generation_prompt=False)
        before, found, suffix = rendered.rpartition(_PROBE)
        if not found:
            raise UserError(
                f"The chat template of {self.name} leaves out the content of an assistant message; set "
                "model.backbone.chat_template to one that writes it."
            )
        generation_prompt = self._render(prompt, add_generation_prompt=True)
        prefix = before.removeprefix(generation_prompt) if before.startswith(generation_prompt) else ""
        return prefix, suffix

    def _find_stop_ids(self, suffix: str, generation_config_stop_ids: Iterable[int]) -> tuple[int, ...]:
        eos = self.tokenizer.eos_token_id
        known = [int(i) for i in generation_config_stop_ids] + ([] if eos is None else [int(eos)])
        after = self._encode(suffix)
        special = self._special_tokens.values()
        # A base model's tokenizer may have a template whose end of turn is no stop of its generation config.
        of_template = [i for i in after if i in known] or [i for i in after if i in special]
        first = of_template[:1] or ([] if eos is None else [int(eos)])
        stops = tuple(dict.fromkeys([*first, *known]))
        if not stops:
            raise UserError(
                f"The tokenizer of {self.name} has no EOS token and its chat template writes no stop token "
                "after an answer; set eos_token in its tokenizer_config.json."
            )
        return stops

    def _find_anchor(self) -> list[int]:
        """Ids of a newline to put before a text where the tokenizer writes a space before the first word.

        SentencePiece tokenizers do so at the start of every text, but a response continues its prompt.
        """
        newline = self._encode("\n")
        return newline if newline and self._encode("\na") != newline + self._encode("a") else []

    def _find_control_tokens(self) -> tuple[ControlTokens, PlainMarks]:
        """The control tokens, and what the template writes between two turns where it writes none of them."""
        tokens = dict(self._special_tokens)
        tokens |= {str(self.tokenizer.convert_ids_to_tokens(index)): index for index in self.stop_ids}
        if self.plain:
            return ControlTokens(self.tokenizer, tokens), PlainMarks((), self.name)
        turns: list[Message] = [
            {"role": role, "content": f"{_PROBE}{number}"} for number, role in enumerate(("user", "assistant", "user"))
        ]
        try:
            rendered = self._render(turns, add_generation_prompt=True)
        except UserError:  # a template for one question and one answer
            rendered = self._render(turns[:1], add_generation_prompt=True)
        # Not all tokens that mark turns are special. Those around thoughts and tools are part of an answer.
        added = {str(token): int(index) for index, token in self.tokenizer.added_tokens_decoder.items()}
        tokens |= {
            text: index for text, index in added.items() if text in rendered and not re.search(r"think|tool", text)
        }
        between = [part.strip() for part in re.split(rf"{_PROBE}\d", rendered)[1:]]
        marks = [part for part in between if part and set(tokens.values()).isdisjoint(self._encode(part))]
        return ControlTokens(self.tokenizer, tokens), PlainMarks(marks, self.name)

    @cached_property
    def _adds_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        with_special_tokens: list[int] = self.tokenizer("a")["input_ids"]
        return bos is not None and with_special_tokens[:1] == [bos] and self._encode("a")[:1] != [bos]

    # The work.

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template is a program: it may add text to None, or divide by zero
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"The chat template of {self.name} refuses a conversation with the roles {roles} ({error}); "
                "change the data or set model.backbone.chat_template."
            ) from error
        assert isinstance(text, str)
        return text

    def _encode(self, text: str) -> list[int]:
        """Template text to ids: special tokens are recognised."""
        return self._encode_all([text])[0]

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        rows: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        return rows

    def _encode_guarded(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation that spells control tokens, of which only the template's become such."""
        hidden, back = self._control.hide(messages, str(self.tokenizer.chat_template))
        ids: list[int] = []
        for part in self._control.split(self.render_prompt(hidden)):
            if isinstance(part, str):
                after_token = bool(ids) and not self._starts_after_tokens
                ids += self._encode_contents([part.translate(back)], self._anchor_ids if after_token else [])[0]
            else:
                ids.append(part)
        return ids

    @cached_property
    def _starts_after_tokens(self) -> bool:
        """Whether text after a control token is encoded as at the start of a text."""
        for token, index in self._control.ids.items():
            if self._encode(token) == [index]:
                return self._encode(f"{token}a") == [index, *self._encode("a")]
        return True

    def _encode_split(self, texts: Sequence[str]) -> list[list[int]]:
        """Text to ids, where what spells a special token becomes ordinary tokens."""
        rows: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        return rows

    def _encode_contents(self, texts: Sequence[str], anchor: list[int] | None = None) -> list[list[int]]:
        """Contents to ids without any control token; they continue a prompt, unless there is no anchor."""
        if not texts:
            return []
        anchor = self._anchor_ids if anchor is None else anchor
        rows = self._encode_split(["\n" + text for text in texts] if anchor else texts)
        for i, text in enumerate(texts):
            if rows[i][: len(anchor)] == anchor:
                rows[i] = rows[i][len(anchor) :]
            else:  # the newline merged with the text
                rows[i] = self._encode_split([text])[0]
            if not self._forbidden_ids.isdisjoint(rows[i]):
                rows[i] = self._encode_broken(text, anchor)
        return rows

    def _encode_broken(self, text: str, anchor: list[int]) -> list[int]:
        """For control tokens that are recognised although told to split: breaks their text after one letter."""
        if len(text) == 1:
            _log.warning("The character %r is a control token of %s and is left out of a text.", text, self.name)
            return []
        tokens = self.tokenizer.convert_ids_to_tokens(sorted(self._forbidden_ids))
        spelled = re.compile("|".join(re.escape(token) for token in tokens if len(token) > 1))
        cuts = [match.start() + 1 for match in spelled.finditer(text) if match[0]] or [len(text) // 2]
        first, *others = (text[start:end] for start, end in pairwise([0, *cuts, len(text)]))
        rows = [*self._encode_contents([first], anchor), *self._encode_contents(others)]
        return [index for row in rows for index in row]


def _read_template(setting: str) -> str:
    """The Jinja text that the setting `chat_template` stands for: a file's, or its own."""
    if "{" in setting:
        return setting
    path = Path(setting).expanduser()
    if not path.is_file():
        raise UserError(
            f"model.backbone.chat_template is {setting!r}, which is neither `{PLAIN}`, an existing file "
            "nor Jinja text; correct the path."
        )
    return path.read_text(encoding="utf-8")
