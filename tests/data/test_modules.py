import pickle

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule

from rto_lightning.backbone.chat import ChatTokenizer
from rto_lightning.data.demonstrations import DemonstrationDataModule
from rto_lightning.data.preferences import PreferenceDataModule
from rto_lightning.data.prompts import PromptDataModule
from rto_lightning.errors import UserError
from tests.tiny import CHATML, tiny_tokenizer

EOS = 2
PAIRS = [
    {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"},
    {"prompt": "Bye", "chosen": "So long", "rejected": "?"},
    {"prompt": "Hi", "chosen": "Good day", "rejected": "No"},
]
MODULES = [PreferenceDataModule, PromptDataModule, DemonstrationDataModule]


def text(chat, ids, mask):
    return chat.tokenizer.decode(ids[mask.bool()])


class TestBatches:
    def test_preferences(self, chat, jsonl):
        data = PreferenceDataModule(test=jsonl(PAIRS), batch_size=3)
        data.chat = chat
        data.setup("test")
        [batch] = data.test_dataloader()
        assert len(batch) == 3
        assert batch.index.tolist() == [0, 1, 2]
        assert batch.characters.tolist() == [5, 7, 8, 2, 1, 2]
        assert batch.cluster[0] == batch.cluster[2] != batch.cluster[1]
        sequences = batch.sequences
        assert sequences.input_ids.shape[0] == 6
        assert text(chat, sequences.input_ids[1], sequences.attention_mask[1]) == (
            "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nSo long<|im_end|>"
        )
        answers = [
            chat.decode_response(ids[mask])
            for ids, mask in zip(sequences.response_ids, sequences.response_mask, strict=True)
        ]
        assert answers == ["Hello", "So long", "Good day", "Go", "?", "No"]
        # Both answers of a pair follow the same prompt in the same columns.
        width = sequences.prompt_width
        assert torch.equal(sequences.input_ids[:3, :width], sequences.input_ids[3:, :width])

    def test_prompts(self, chat, jsonl):
        data = PromptDataModule(predict=jsonl(PAIRS), eval_batch_size=2)
        data.chat = chat
        data.setup("predict")
        first, second = data.predict_dataloader()
        assert (len(first), len(second)) == (2, 1)
        assert first.index.tolist() == [0, 1]
        assert second.index.tolist() == [2]
        assert first.messages == [[{"role": "user", "content": word}] for word in ("Hi", "Bye")]
        assert first.input_ids[0, 0] == chat.pad_id
        assert first.attention_mask[0, :2].tolist() == [0, 1]  # "Hi" is a letter shorter than "Bye"
        assert first.input_ids.dtype == first.attention_mask.dtype == torch.int64
        assert first.input_ids[1].tolist() == chat.encode_prompt(first.messages[1])

    def test_demonstrations(self, chat, jsonl):
        data = DemonstrationDataModule(validation=jsonl([{"prompt": "Hi", "response": "Hello"}]))
        data.chat = chat
        data.setup("validate")
        [batch] = data.val_dataloader()
        assert text(chat, batch.sequences.input_ids[0], batch.sequences.attention_mask[0]).endswith(
            "assistant\nHello<|im_end|>"
        )
        assert batch.index.tolist() == [0]

    @pytest.mark.parametrize("kind", MODULES)
    def test_they_move_and_can_be_pickled(self, chat, jsonl, kind):
        data = kind(test=jsonl(PAIRS))
        data.chat = chat
        data.setup("test")
        [batch] = data.test_dataloader()
        assert batch.to("meta").index.device.type == "meta"
        pickle.loads(pickle.dumps(data.test_dataloader().collate_fn))


class TestLimits:
    def test_long_prompts_are_dropped_and_counted(self, chat, jsonl, caplog):
        limit = len(chat.encode_prompt([{"role": "user", "content": "Hi"}]))
        source = jsonl(PAIRS)
        data = PromptDataModule(test=source, max_prompt_tokens=limit)
        data.chat = chat
        data.setup("test")
        assert [row.index for row in data.rows["test"]] == [0, 2]
        assert caplog.messages == [f"{source}: dropped 1 prompts of more than {limit} tokens."]

    def test_nothing_left_is_an_error(self, chat, jsonl):
        data = PromptDataModule(test=jsonl(PAIRS), max_prompt_tokens=1)
        data.chat = chat
        with pytest.raises(
            UserError, match=r"no usable row: 0 are bad and 3 have a prompt of more than data\.max_prompt_"
        ):
            data.setup("test")

    def test_answers_are_cut_from_the_right_and_lose_their_stop(self, chat, jsonl):
        data = PreferenceDataModule(test=jsonl(PAIRS), max_response_tokens=5)
        data.chat = chat
        data.setup("test")
        [batch] = data.test_dataloader()
        answers = [
            chat.decode_response(ids[mask])
            for ids, mask in zip(batch.sequences.response_ids, batch.sequences.response_mask, strict=True)
        ]
        assert answers == ["Hello", "So lo", "Good ", "Go", "?", "No"]
        assert (batch.sequences.response_ids[:3] != EOS).all()
        assert batch.sequences.response_lengths.tolist() == [5, 5, 5, 3, 2, 3]
        assert batch.characters.tolist() == [5, 7, 8, 2, 1, 2]  # before the cut

    def test_only_the_first_rows(self, chat, jsonl):
        source = jsonl(PAIRS)
        data = PromptDataModule(train=source, validation=source, max_train_rows=2, max_eval_rows=1, batch_size=1)
        data.chat = chat
        data.setup("fit")
        assert (len(data.rows["train"]), len(data.rows["validation"])) == (2, 1)

    @pytest.mark.parametrize(
        "name", ["batch_size", "eval_batch_size", "max_prompt_tokens", "max_eval_rows", "tokenize_workers"]
    )
    def test_they_are_positive(self, name):
        with pytest.raises(UserError, match=rf"data\.{name} is 0; set it to 1 or more\."):
            PromptDataModule(**{name: 0})


class TestBadRows:
    rows = [*PAIRS, {"prompt": "Hi", "chosen": "", "rejected": "b"}]

    def test_they_stop_the_set_up(self, chat, jsonl):
        data = PreferenceDataModule(test=jsonl(self.rows))
        data.chat = chat
        with pytest.raises(UserError, match=r"Row 4 of .*rows\.jsonl: the answer in `chosen` is empty"):
            data.setup("test")

    def test_or_are_skipped_and_counted(self, chat, jsonl, caplog):
        source = jsonl(self.rows)
        data = PreferenceDataModule(test=source, bad_rows="skip")
        data.chat = chat
        data.setup("test")
        assert len(data.rows["test"]) == 3
        assert caplog.messages == [
            f"{source}: skipped 1 bad rows, the first of them Row 4 of {source}: the answer in `chosen` is empty."
        ]

    def test_a_prompt_that_the_template_refuses_is_one(self, jsonl):
        refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        source = jsonl([{"prompt": "Hi"}, {"prompt": system}, {"prompt": "Bye"}])
        data = PromptDataModule(test=source)
        data.chat = ChatTokenizer(tiny_tokenizer(), chat_template=refuse + CHATML)
        with pytest.raises(
            UserError,
            match=r"Row 2 of .*rows\.jsonl: the chat template refuses .*\(no system role\); correct it",
        ):
            data.setup("test")
        data.bad_rows = "skip"
        data.setup("test")
        assert [row.index for row in data.rows["test"]] == [0, 2]


class TestStages:
    @pytest.mark.parametrize(
        "stage, sources",
        [
            ("fit", {"train", "validation"}),
            ("validate", {"validation"}),
            ("test", {"test"}),
            ("predict", {"predict"}),
        ],
    )
    def test_each_loads_what_it_needs(self, chat, jsonl, stage, sources):
        source = jsonl(PAIRS)
        data = PromptDataModule(source, source, source, source, batch_size=1)
        data.chat = chat
        data.setup(stage)
        assert set(data.rows) == sources

    @pytest.mark.parametrize(
        "stage, name",
        [("fit", "train"), ("validate", "validation"), ("test", "test"), ("predict", "predict")],
    )
    def test_a_source_that_is_not_set_is_named(self, chat, stage, name):
        data = PromptDataModule()
        data.chat = chat
        with pytest.raises(UserError, match=rf"data\.{name} is not set; give it a file"):
            data.setup(stage)

    def test_validation_during_training_is_optional(self, chat, jsonl):
        data = PromptDataModule(train=jsonl(PAIRS), batch_size=1)
        data.chat = chat
        data.setup("fit")
        assert data.val_dataloader() == []

    def test_without_a_tokenizer(self, jsonl):
        with pytest.raises(RuntimeError, match="set `chat` to a ChatTokenizer"):
            PromptDataModule(test=jsonl(PAIRS)).setup("test")


class TestFirstRows:
    """A few fixed rows to look at while training."""

    def test_they_are_of_validation_or_of_training(self, chat, jsonl):
        others = jsonl([{"prompt": f"Question {n}?"} for n in range(3)], "others.jsonl")
        data = PromptDataModule(train=jsonl(PAIRS), batch_size=1)
        data.chat = chat
        data.setup("fit")
        batch = data.first_rows(2)
        assert [turns[0]["content"] for turns in batch.messages] == ["Hi", "Bye"]
        data = PromptDataModule(train=jsonl(PAIRS), validation=others, batch_size=1)
        data.chat = chat
        data.setup("fit")
        batch = data.first_rows(9)
        assert [turns[0]["content"] for turns in batch.messages] == [f"Question {n}?" for n in range(3)]

    def test_a_stream_has_none(self, chat, jsonl):
        data = PromptDataModule(train=jsonl(PAIRS), batch_size=1, streaming=True)
        data.chat = chat
        data.setup("fit")
        with pytest.raises(UserError, match=r"cannot be told; set data\.validation"):
            data.first_rows(1)


@pytest.mark.parametrize("kind", MODULES)
def test_the_command_line_shows_every_argument_with_its_help(kind):
    parser = ArgumentParser()
    parser.add_class_arguments(kind, "data")
    shown = " ".join(parser.format_help().split())
    for name, words in {
        "train": "Source to train on.",
        "max_prompt_tokens": "Longer prompts are dropped",
        "bad_rows": "`skip` leaves such rows out",
        "seed": "The order of the training rows",
        "tokenize_workers": "Processes that tokenize",
        "streaming": "needs trainer.max_steps",
        "shuffle_buffer_rows": "1 leaves them in their order",
    }.items():
        assert f"--data.{name}" in shown
        assert words in shown
    assert ("Longer answers are cut from the right" in shown) == (kind is not PromptDataModule)
    assert issubclass(kind, LightningDataModule)
    settings = parser.instantiate(parser.parse_args(["--data.train=a.jsonl", "--data.batch_size=3"])).data
    assert (settings.sources["train"], settings.batch_size, settings.eval_batch_size) == ("a.jsonl", 3, 3)


@pytest.mark.parametrize(("constant", "warned"), [(25, True), (1, False)])
def test_one_answer_to_many_prompts_is_pointed_out(jsonl, caplog, constant, warned):
    rows = [
        {"prompt": f"Q{n}?", "chosen": "} } verify" if n < constant else f"yes {n}", "rejected": f"no {n}"}
        for n in range(40)
    ]
    data = PreferenceDataModule(train=jsonl(rows), batch_size=2)
    data.chat = ChatTokenizer(tiny_tokenizer())
    data.setup("fit")
    assert ("same answer stands in 25 of 40 pairs ('} } verify'" in caplog.text) == warned
