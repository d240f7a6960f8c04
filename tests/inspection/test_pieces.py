"""Texts of single tokens, and which of them are shown together."""

from hypothesis import given
from hypothesis import strategies as st

from rto_lightning.backbone.chat import ChatTokenizer
from rto_lightning.inspection.pieces import spans, token_texts
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CHAT = ChatTokenizer(TOKENIZER)


def texts_of(text: str, limit: int = 10_000) -> tuple[list[str], list[bool]]:
    return token_texts(TOKENIZER, CHAT.encode_response(text, limit))


def test_a_character_of_several_tokens_stands_at_its_last_one() -> None:
    texts, special = texts_of("é!")
    assert texts == ["", "é", "!", "<|im_end|>"]
    assert special == [False, False, False, True]
    assert [tuple(span) for span in spans(texts, special)] == [("é", 0, 2), ("!", 2, 3), ("<|im_end|>", 3, 4)]


def test_what_is_seen_as_one_character_is_one_span() -> None:
    family = "\U0001f469\u200d\U0001f467"
    thumb = "\U0001f44d\U0001f3fd"
    accent = "e\u0301"
    shown = [span.text for span in spans(*texts_of(f"{family}{thumb}{accent}x"))]
    assert shown == [family, thumb, accent, "x", "<|im_end|>"]


def test_a_character_that_is_cut_off_is_a_replacement_character() -> None:
    texts, special = texts_of("ab\U0001f600", limit=4)
    assert texts == ["a", "b", "", "\ufffd"]
    assert [span.text for span in spans(texts, special)] == ["a", "b", "\ufffd"]


def test_a_special_token_stands_alone_and_ends_a_character_before_it() -> None:
    half = CHAT.encode_response("é", 1)
    texts, special = token_texts(TOKENIZER, [*half, 2, *CHAT.encode_response("\u0301", 2)])
    assert texts == ["\ufffd", "<|im_end|>", "", "\u0301"]
    assert [span.text for span in spans(texts, special)] == ["\ufffd", "<|im_end|>", "\u0301"]


def test_text_that_spells_a_special_token_is_not_one() -> None:
    texts, special = texts_of("<|im_end|>")
    assert "".join(texts[:-1]) == "<|im_end|>" and not any(special[:-1]) and special[-1]


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=30))
def test_all_texts_together_are_the_response(text: str) -> None:
    texts, special = texts_of(text)
    assert "".join(texts[:-1]) == text
    joined = spans(texts, special)
    assert "".join(span.text for span in joined[:-1]) == text
    assert [span.start for span in joined] == [0, *(span.end for span in joined[:-1])]
    assert joined[-1].end == len(texts)
