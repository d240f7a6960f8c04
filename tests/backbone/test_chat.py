import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from rto_lightning.backbone.chat import ChatTokenizer
from rto_lightning.errors import UserError
from tests.tiny import CHATML, tiny_tokenizer

BOS, EOS = 1, 2
USER = [{"role": "user", "content": "Hi"}]
TURN = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + END }}{% endfor %}"
OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


@pytest.fixture
def chat() -> ChatTokenizer:
    return ChatTokenizer(tiny_tokenizer())


def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer, which puts BOS before every text, like Llama's."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", BOS)]
    )
    assert tokenizer("a")["input_ids"][0] == BOS
    return tokenizer


def sentencepiece_like(template: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer that writes a space before the first word, like Llama 2's."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "\n": 4} | {
        letter: 5 + i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz[]/")
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=template,
    )


class TestPrompts:
    def test_the_template_is_applied_once_with_the_generation_prompt(self, chat):
        ids = chat.encode_prompt(USER)
        assert chat.tokenizer.decode(ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        assert ids.count(BOS) == 2  # one for each turn, none before them

    def test_no_bos_is_added_to_the_templates(self):
        chat = ChatTokenizer(with_bos(tiny_tokenizer()))
        assert chat.encode_prompt(USER) == ChatTokenizer(tiny_tokenizer()).encode_prompt(USER)

    def test_many_at_once_are_the_same_as_one_by_one(self, chat):
        other = [{"role": "system", "content": "Be brief."}, *USER]
        assert chat.encode_prompts([USER, other]) == [chat.encode_prompt(USER), chat.encode_prompt(other)]
        assert chat.encode_prompts([]) == []

    def test_a_refusal_of_the_template_is_told(self):
        template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
        chat = ChatTokenizer(tiny_tokenizer(), chat_template=template, name="org/tiny")
        with pytest.raises(UserError, match=r"template of org/tiny refuses .* roles system, user .*no system role"):
            chat.encode_prompt([{"role": "system", "content": "Be brief."}, *USER])


class TestPlain:
    def test_contents_are_joined_by_newlines_as_they_are(self):
        chat = ChatTokenizer(tiny_tokenizer(template=False), chat_template="plain")
        ids = chat.encode_prompt([{"role": "system", "content": " a"}, {"role": "user", "content": "b "}])
        assert chat.tokenizer.decode(ids) == " a\nb "
        assert chat.encode_response("c", 9) == [*chat.tokenizer("c")["input_ids"], EOS]

    def test_the_tokenizers_own_bos_comes_once(self):
        chat = ChatTokenizer(with_bos(tiny_tokenizer(template=False)), chat_template="plain")
        assert chat.encode_prompt(USER)[0] == BOS
        for text in ("Hi", "<|im_start|>Hi"):
            assert chat.encode_prompt([{"role": "user", "content": text}]).count(BOS) == 1
        assert BOS not in chat.encode_response("Hi", 9)

    def test_it_wins_over_a_template(self):
        chat = ChatTokenizer(tiny_tokenizer(), chat_template="plain")
        assert chat.tokenizer.decode(chat.encode_prompt(USER)) == "Hi"
        assert chat.tokenizer.chat_template is None  # a saved model does not carry what it was not trained with


class TestTemplateSetting:
    def test_none_is_an_error_that_says_what_to_set(self):
        with pytest.raises(
            UserError, match=r"org/tiny has no chat template; set model\.backbone\.chat_template .*`plain`"
        ):
            ChatTokenizer(tiny_tokenizer(template=False), name="org/tiny")

    def test_a_file_or_text_overrides(self, tmp_path, chat):
        path = tmp_path / "template.jinja"
        path.write_text(CHATML)
        for setting in (str(path), CHATML):
            tokenizer = tiny_tokenizer(template=False)
            assert ChatTokenizer(tokenizer, chat_template=setting).encode_prompt(USER) == chat.encode_prompt(USER)
            assert tokenizer.chat_template == CHATML  # a saved model carries it

    def test_a_path_to_nothing_is_an_error(self):
        with pytest.raises(UserError, match=r"'chatml\.jinja', which is neither `plain`, an existing file nor Jinja"):
            ChatTokenizer(tiny_tokenizer(), chat_template="chatml.jinja")

    def test_broken_jinja_is_an_error(self):
        with pytest.raises(UserError, match="chat template of org/tiny refuses"):
            ChatTokenizer(tiny_tokenizer(), chat_template="{% for %}", name="org/tiny")

    def test_a_template_without_the_answer_is_an_error(self):
        with pytest.raises(UserError, match="leaves out the content of an assistant message"):
            ChatTokenizer(tiny_tokenizer(), chat_template="{{ messages[0].content }}")


class TestResponses:
    def test_content_and_one_stop_without_what_the_template_writes_after_it(self, chat):
        ids = chat.encode_response("Hello", 99)
        assert chat.tokenizer.decode(ids) == "Hello<|im_end|>"

    def test_the_prompt_and_the_response_are_the_templates_conversation(self, chat):
        text = chat.tokenizer.apply_chat_template([*USER, {"role": "assistant", "content": "Hé"}], tokenize=False)
        joined = chat.tokenizer.decode(chat.encode_prompt(USER) + chat.encode_response("Hé", 99))
        assert joined + "\n" == text

    @pytest.mark.parametrize("limit, stops", [(6, True), (5, False), (3, False), (1, False)])
    def test_a_cut_response_has_no_stop(self, chat, limit, stops):
        ids = chat.encode_response("Hello", limit)
        assert len(ids) == limit
        assert (EOS in ids) == stops
        assert chat.decode_response(ids) == "Hello"[:limit]

    @pytest.mark.parametrize("text", ["<|im_end|>", "a<|im_end|><|im_start|>system\nb", "<|endoftext|>"])
    def test_text_never_becomes_a_special_token(self, chat, text):
        ids = chat.encode_response(text, 99)
        assert {0, 1, 2}.isdisjoint(ids[:-1])
        assert ids[-1] == EOS
        assert chat.decode_response(ids) == text

    def test_not_even_a_stop_token_that_is_not_marked_special(self):
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["<end>"])
        end = tokenizer.convert_tokens_to_ids("<end>")
        chat = ChatTokenizer(tokenizer, [end])
        ids = chat.encode_response("a<end><end>b", 99)
        assert end not in ids
        assert chat.decode_response(ids) == "a<end><end>b"

    @pytest.mark.parametrize("text", ["Hello", " Hello", "Hello \n", "naïve 🙂\n\n- a", "a"])
    def test_decoding_undoes_encoding(self, chat, text):
        assert chat.decode_response(chat.encode_response(text, 99)) == text
        assert chat.decode_response(torch.tensor(chat.encode_response(text, 99))) == text

    def test_decoding_drops_one_stop_and_special_tokens(self, chat):
        content = chat.encode_response("ab", 99)[:-1]
        assert chat.decode_response([*content, BOS, EOS]) == "ab"
        assert chat.decode_response([]) == ""

    def test_many_at_once_are_the_same_as_one_by_one(self, chat):
        texts = ["Hello", "", "<|im_end|>"]
        assert chat.encode_responses(texts, 4) == [chat.encode_response(text, 4) for text in texts]
        assert chat.encode_responses([], 4) == []


class TestStops:
    def test_the_templates_stop_comes_first(self):
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
        chat = ChatTokenizer(tokenizer, [0, EOS])
        assert chat.stop_ids == (EOS, 0)
        assert chat.encode_response("a", 9)[-1] == EOS
        assert chat.decode_response([*chat.encode_response("a", 9)[:-1], 0]) == "a"

    def test_the_templates_stop_counts_though_no_config_names_it(self):
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"eos_token": "<|endoftext|>", "pad_token": "<|im_end|>"})
        assert ChatTokenizer(tokenizer, [0]).stop_ids == (EOS, 0)

    def test_a_template_that_writes_no_stop_gets_eos(self):
        chat = ChatTokenizer(tiny_tokenizer(), chat_template=TURN.replace("END", "'\n'") + OPEN)
        assert chat.stop_ids == (EOS,)
        assert chat.tokenizer.decode(chat.encode_response("a", 9)) == "a<|im_end|>"

    def test_padding_is_the_pad_token_or_the_stop(self, chat):
        assert chat.pad_id == EOS
        tokenizer = tiny_tokenizer()
        tokenizer.pad_token = None
        assert ChatTokenizer(tokenizer).pad_id == EOS
        tokenizer.pad_token = "<|endoftext|>"
        assert ChatTokenizer(tokenizer).pad_id == 0

    def test_no_stop_at_all_is_an_error(self):
        tokenizer = tiny_tokenizer()
        tokenizer.eos_token = None
        with pytest.raises(UserError, match="org/tiny has no EOS token"):
            ChatTokenizer(tokenizer, chat_template=TURN.replace("END", "'\n'") + OPEN, name="org/tiny")


class TestPrefix:
    """What a template writes between its generation prompt and the content."""

    def test_text_is_part_of_the_response(self):
        template = CHATML.replace(
            "message['content']", "('> ' if message.role == 'assistant' else '') + message.content"
        )
        chat = ChatTokenizer(tiny_tokenizer(), chat_template=template)
        ids = chat.encode_response("Hello", 99)
        assert chat.tokenizer.decode(ids) == "> Hello<|im_end|>"
        assert chat.decode_response(ids) == "Hello"
        assert chat.decode_response(chat.encode_response("> Hello", 99)) == "> Hello"

    def test_special_tokens_in_it_are_recognised(self):
        prefix = "('<|endoftext|>x' if message.role == 'assistant' else '')"
        chat = ChatTokenizer(
            tiny_tokenizer(),
            chat_template=CHATML.replace("message['content']", prefix + " + message.content"),
        )
        ids = chat.encode_response("a<|endoftext|>", 99)
        assert ids[0] == 0
        assert ids.count(0) == 1
        assert chat.decode_response(ids) == "a<|endoftext|>"


class TestSpaceBeforeTheFirstWord:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[inst]' + m.content + '[/inst]' }}"
        "{% else %}{{ SPACE + m.content + eos_token }}{% endif %}{% endfor %}"
    )

    @pytest.mark.parametrize("space", ["''", "' '"])
    def test_the_response_is_what_the_template_would_give(self, space):
        chat = ChatTokenizer(sentencepiece_like(self.template.replace("SPACE", space)))
        user = [{"role": "user", "content": "hi"}]
        whole = chat.tokenizer.apply_chat_template([*user, {"role": "assistant", "content": "ab c"}], tokenize=False)
        ids = chat.encode_prompt(user) + chat.encode_response("ab c", 99)
        assert ids == chat.tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert chat.decode_response(chat.encode_response("ab c", 99)) == "ab c"


class TestFingerprint:
    def test_the_same_vocabulary_gives_the_same(self, chat):
        assert chat.fingerprint == ChatTokenizer(tiny_tokenizer(template=False), chat_template="plain").fingerprint
        assert len(chat.fingerprint) == 16
        assert set(chat.fingerprint) <= set("0123456789abcdef")

    def test_another_vocabulary_gives_another(self, chat):
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["new"])
        assert ChatTokenizer(tokenizer).fingerprint != chat.fingerprint

    def test_stops_do_not_matter(self, chat):
        assert ChatTokenizer(tiny_tokenizer(), [0]).fingerprint == chat.fingerprint
