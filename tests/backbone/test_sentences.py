"""Ends of sentences, under the tokenizers that models come with."""

import re
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rto_lightning.backbone import sentence_ends
from rto_lightning.quickstart.model import tiny_tokenizer as word_tokenizer
from tests.tiny import tiny_tokenizer as byte_tokenizer

CORPUS = [
    'Pi is 3.14. He said "Go." Then... what?!\n\nNew line.\n- (yes.) no!',
    "the cat sat. the dog ran! so what? 你好。 我很好！ fine… 🙂",
] * 20
ALPHABET = ["a", "b", " ", "3", ".", "!", "?", '"', ")", "\n", ". T", '." ', "...", "the cat", "…", "。", "é", "🙂"]
REGEX = re.compile(r"""[.!?…]+["')]*(?=\s|\Z)|[.!?…]*[。！？][.!?…。！？]*["')]*|\n+""")


def _fast(tokenizer):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>")


@cache
def _byte_level_bpe():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<unk>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _fast(tokenizer)


@cache
def _unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120,
        special_tokens=["<unk>", "</s>"],
        unk_token="<unk>",
        initial_alphabet=[*'ab3.!?")\n…。é🙂'],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _fast(tokenizer)


@cache
def _byte_fallback():
    """As Llama 2's: what is no token is spelt in bytes, and the first blank is stripped."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *'▁abcehst.!?")', "."]
    tokenizer = Tokenizer(
        models.BPE({piece: index for index, piece in enumerate(dict.fromkeys(pieces))}, [], byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _fast(tokenizer)


TOKENIZERS = {"bytes": cache(byte_tokenizer), "bpe": _byte_level_bpe, "unigram": _unigram, "fallback": _byte_fallback}


def _decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _ends(tokenizer, ids):
    """Positions of the marked tokens of one response."""
    response = torch.tensor([ids], dtype=torch.int64)
    return (
        sentence_ends(tokenizer, response, torch.ones_like(response, dtype=torch.bool))[0].nonzero().flatten().tolist()
    )


def _encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "marked",
    [
        "Pi is 3.14.| He rounds 2.5 up.|",
        "Wait...| What?!| Go!| on",
        'He said "Go."| Then (he went.)| **Bold.**| “So.”| ‘No?’| end',
        "v1.2.3 and a.b and .5 and ...so",
        "no end",
        "Dr.| Who, e.g.| this",
        "One.|\n|Two\n\n|Three.|\n\n|\tfour",
        "Text.| \n|Text",
        "Windows.|\r\n|line",
        "你好。|我很好！|“真的？！”|是…|",
        '他说：「好。」|他说"对！"|',
        "„Ende.“| »Gut.«| Aus",
        "…and so…| on",
        "?|",
        "",
    ],
)
def test_rule(marked):
    """A bar stands behind each end; every character is a token, or several."""
    tokenizer = byte_tokenizer()
    text = "".join(marked.split("|"))
    prefixes = ["".join(marked.split("|")[: index + 1]) for index in range(marked.count("|"))]
    assert _ends(tokenizer, _encode(tokenizer, text)) == [len(prefix.encode()) - 1 for prefix in prefixes]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_marks_are_the_ends_of_the_decoded_text(name, data):
    tokenizer = TOKENIZERS[name]()
    ids = _encode(tokenizer, "".join(data.draw(st.lists(st.sampled_from(ALPHABET), max_size=20))))
    text = _decode(tokenizer, ids)
    expected = []
    for match in REGEX.finditer(text):
        so_far = text[: match.end()]
        expected.append(next(k for k in range(len(ids)) if _decode(tokenizer, ids[: k + 1]).startswith(so_far)))
    assert _ends(tokenizer, ids) == sorted(set(expected))


def test_tokens_that_hold_more_than_the_end():
    tokenizer = _byte_level_bpe()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    tokenizer.add_tokens([". T", '.\n\n"', "1.5"])
    ids = _encode(tokenizer, 'a 1.5. The b.\n\n"c')
    marked = [tokenizer.decode([ids[position]]) for position in _ends(tokenizer, ids)]
    assert marked == [". T", '.\n\n"']


def test_words_are_joined_by_blanks():
    tokenizer = word_tokenizer()
    ids = _encode(tokenizer, "the red phone is superb . nobody likes it , . mine")
    assert tokenizer.unk_token_id in ids
    assert _ends(tokenizer, ids) == [5, 10]


def test_stop_tokens_have_no_text():
    tokenizer = byte_tokenizer()
    ids = _encode(tokenizer, "Yes. No.")
    assert _ends(tokenizer, [*ids, tokenizer.eos_token_id]) == [3, 7]
    assert _ends(tokenizer, [*ids[:-1], tokenizer.eos_token_id]) == [3]


def test_rows_keep_their_places_and_padding_is_not_read():
    tokenizer = byte_tokenizer()
    rows = [_encode(tokenizer, "A. B"), _encode(tokenizer, "C."), []]
    response_ids = torch.full((3, 6), -1)
    mask = torch.zeros(3, 6, dtype=torch.bool)
    for row, (ids, start) in enumerate(zip(rows, (0, 3, 0), strict=True)):
        response_ids[row, start : start + len(ids)] = torch.tensor(ids, dtype=torch.int64)
        mask[row, start : start + len(ids)] = True
    ends = sentence_ends(tokenizer, response_ids, mask)
    assert ends.dtype == torch.bool
    assert ends.nonzero().tolist() == [[0, 1], [1, 4]]
    assert sentence_ends(tokenizer, response_ids[:, :0], mask[:, :0]).shape == (3, 0)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(sorted(TOKENIZERS)), st.data())
def test_any_tokens_can_be_read(name, data):
    """Also bytes that are no text, ids beyond the vocabulary and special tokens in the middle."""
    tokenizer = TOKENIZERS[name]()
    line_break = _encode(tokenizer, "\n")[-1]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 3), max_size=20))
    assert _ends(tokenizer, [*ids, line_break])[-1:] == [len(ids)]


def test_texts_of_tokens_are_kept():
    tokenizer = byte_tokenizer()
    ids = _encode(tokenizer, "One. Two. 你好。")
    first = _ends(tokenizer, ids)
    tokenizer.decode = None
    assert _ends(tokenizer, ids) == first != []
