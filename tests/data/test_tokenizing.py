"""Texts that are legal, though strange, and those that no model should be given."""

from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from rto_lightning.backbone.chat import ChatTokenizer
from rto_lightning.data import DemonstrationDataModule, PreferenceDataModule, PromptDataModule, tokenizing
from rto_lightning.data.tokenizing import in_parts
from rto_lightning.errors import UserError
from tests.backbone.test_chat import sentencepiece_like, with_bos
from tests.tiny import CHATML, tiny_tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
STRANGE = [
    "\0",
    "\x01\x1b[31m",
    "\ufeff",
    "\u202eabc",
    "🙂",
    "👨‍👩‍👧",
    "é",
    "\u0301",
    "\r\n",
    "\t",
    " ",
    "\x85",
    "{{ 7*7 }}",
]
texts = st.lists(st.sampled_from([*SPECIAL, *STRANGE, "a", "Hi"]) | st.text(max_size=4), max_size=6).map("".join)
visible = texts.filter(str.strip)
on_one_file = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
DROPS_SYSTEM = CHATML.replace(
    "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
)
SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def pad_is_not_eos():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<|endoftext|>"
    return ChatTokenizer(tokenizer)


def no_bos():
    tokenizer = tiny_tokenizer(template=False)
    tokenizer.bos_token = None
    return ChatTokenizer(tokenizer, chat_template="plain")


CHATS = {
    "pad = EOS": ChatTokenizer(tiny_tokenizer()),
    "pad of its own": pad_is_not_eos(),
    "no BOS": no_bos(),
    "a BOS of its own": ChatTokenizer(with_bos(tiny_tokenizer(template=False)), chat_template="plain"),
}


def rows_of(kind, source, chat, **options):
    data = kind(test=source, **options)
    data.chat = chat
    data.setup("test")
    return data, data.rows["test"]


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
class TestAnyText:
    @on_one_file
    @given(prompt=visible, chosen=visible, rejected=visible, limit=st.integers(1, 20))
    def test_answers_have_one_stop_or_were_cut(self, jsonl, chat, prompt, chosen, rejected, limit):
        source = jsonl([{"prompt": prompt, "chosen": chosen, "rejected": rejected}])
        _, [row] = rows_of(PreferenceDataModule, source, chat, max_response_tokens=limit, max_prompt_tokens=500)
        for text, ids in ((chosen, row.chosen), (rejected, row.rejected)):
            content = [*text.encode()]  # a token is a byte
            assert len(ids) == min(limit, len(content) + 1)
            assert (ids[-1] == chat.stop_ids[0]) == (len(content) < limit)
            assert {0, 1, 2}.isdisjoint(ids[:-1])
            if len(content) < limit:
                assert chat.decode_response(ids) == text
        assert row.characters == (len(chosen), len(rejected))

    @on_one_file
    @given(rows=st.lists(st.fixed_dictionaries({"prompt": visible, "response": visible}), min_size=1, max_size=4))
    def test_a_batch_holds_its_rows_and_padding_that_is_masked(self, jsonl, chat, rows):
        source = jsonl([*rows, rows[0]])  # a row may occur twice
        data, encoded = rows_of(DemonstrationDataModule, source, chat, max_response_tokens=9)
        [batch] = data.test_dataloader()
        sequences = batch.sequences
        for row, index in zip(encoded, range(len(batch)), strict=True):
            width, prompt, response = sequences.prompt_width, len(row.prompt), len(row.response)
            assert sequences.input_ids[index, width - prompt : width + response].tolist() == [
                *row.prompt,
                *row.response,
            ]
            mask = [0] * (width - prompt) + [1] * (prompt + response) + [0] * (sequences.response_width - response)
            assert sequences.attention_mask[index].tolist() == mask
            assert sequences.response_mask[index].tolist() == [bool(flag) for flag in mask[width:]]
        assert encoded[-1].response == encoded[0].response

    @on_one_file
    @given(prompts=st.lists(visible, min_size=1, max_size=4))
    def test_reward_functions_get_the_prompts_as_they_were(self, jsonl, chat, prompts):
        data, encoded = rows_of(PromptDataModule, jsonl([{"prompt": prompt} for prompt in prompts]), chat)
        [batch] = data.test_dataloader()
        assert [messages[-1]["content"] for messages in batch.messages] == prompts
        assert batch.attention_mask.sum(dim=1).tolist() == [len(row.prompt) for row in encoded]
        assert batch.attention_mask[:, -1].all()


@pytest.mark.parametrize(
    "template", [DROPS_SYSTEM, "{% for m in messages[-1:] %}{{ m.content }}<|im_end|>{% endfor %}"]
)
def test_a_turn_that_the_template_drops_is_missed(jsonl, template):
    source = jsonl([{"prompt": "Hi"}, {"prompt": SYSTEM}])
    chat = ChatTokenizer(tiny_tokenizer(), chat_template=template)
    with pytest.raises(UserError, match=r"^Row 2 of .*: the chat template leaves out its system message; correct it"):
        rows_of(PromptDataModule, source, chat)
    _, [row] = rows_of(PromptDataModule, source, chat, bad_rows="skip")
    assert row.index == 0


@pytest.mark.parametrize("fault", ["{{ 1 // 0 }}", "{{ 'a' + 1 }}", "{{ raise_exception('no') }}", "{{ none.x.y }}"])
def test_whatever_the_template_raises_is_the_fault_of_the_row(jsonl, caplog, fault):
    template = "{% if messages[0].content == 'Boo' %}" + fault + "{% endif %}" + CHATML
    source = jsonl([{"prompt": "Hi"}, {"prompt": "Boo"}])
    chat = ChatTokenizer(tiny_tokenizer(), chat_template=template)
    with pytest.raises(UserError, match=r"^Row 2 of .*: the chat template refuses its prompt \(.+\); correct it"):
        rows_of(PromptDataModule, source, chat)
    _, [row] = rows_of(PromptDataModule, source, chat, bad_rows="skip")
    assert row.index == 0
    assert "skipped 1 bad rows, the first of them Row 2 of" in caplog.text


def test_a_prompt_without_tokens_is_bad(jsonl):
    chat = ChatTokenizer(tiny_tokenizer(template=False), chat_template="plain")
    chat.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    with pytest.raises(UserError, match=r"^Row 2 of .*: its prompt has no tokens; correct it"):
        rows_of(PromptDataModule, jsonl([{"prompt": "Hi"}, {"prompt": "\u200b"}]), chat)


def test_texts_without_any_known_letter_have_an_answer_of_one_stop(jsonl):
    chat = ChatTokenizer(sentencepiece_like(None), chat_template="plain")
    _, [row] = rows_of(DemonstrationDataModule, jsonl([{"prompt": "a", "response": "🙂"}]), chat)
    assert row.response[-1] == chat.stop_ids[0]


def test_huge_texts_are_tokenized_apart_and_as_ever(jsonl, chat, monkeypatch):
    rows = [{"prompt": f"p{n}" * n, "chosen": f"c{n}" * 10 * n, "rejected": "r"} for n in range(1, 9)]
    _, expected = rows_of(PreferenceDataModule, jsonl(rows), chat)
    expected = list(expected)
    monkeypatch.setattr(tokenizing, "_CHARACTERS_AT_ONCE", 20)
    assert list(rows_of(PreferenceDataModule, jsonl(rows), chat)[1]) == expected


@given(st.lists(st.integers(0, 30), max_size=9))
def test_parts_are_no_larger_than_asked_for_unless_they_are_one_item(sizes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizing, "_CHARACTERS_AT_ONCE", 20)
        parts = list(in_parts(sizes, lambda size: size))
    assert [size for part in parts for size in part] == sizes
    assert all(sum(part) <= 20 or len(part) == 1 for part in parts)
    assert all(sum(left) + right[0] > 20 for left, right in pairwise(parts))
