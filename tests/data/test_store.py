import errno
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import chain
from types import SimpleNamespace

import datasets
import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from rto_lightning.backbone.chat import ChatTokenizer
from rto_lightning.data import DemonstrationDataModule, PreferenceDataModule, PromptDataModule, store
from rto_lightning.errors import UserError
from tests.data.test_order import Recorder, one_of
from tests.tiny import CHATML, tiny_tokenizer

CONSTANT = "I cannot help with that."


def pairs(count, **first):
    """One answer stands in every second pair; a prompt in ten is long."""
    rows = [
        {"prompt": f"p{n}" + "?" * 60 * (n % 10 == 7), "chosen": f"c{n}", "rejected": CONSTANT if n % 2 else f"r{n}"}
        for n in range(count)
    ]
    return [{**rows[0], **first}, *rows[1:]]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of tokenized rows, of which a few already go to a file."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(store, "IN_MEMORY_BYTES", 100)
    monkeypatch.setattr(store, "CHUNK_ROWS", 4)
    monkeypatch.setattr(store, "ROWS_ALONE", 12)
    return tmp_path / "cache" / "rto_lightning"


def load(source, chat, kind=PreferenceDataModule, **settings):
    data = kind(test=source, **{"max_prompt_tokens": 60, "bad_rows": "skip", **settings})
    data.chat = chat
    data.setup("test")
    return data.rows["test"]


class TestCache:
    def test_small_sets_leave_no_file(self, chat, jsonl, cache, monkeypatch):
        monkeypatch.setattr(store, "IN_MEMORY_BYTES", 10**6)
        rows = load(jsonl(pairs(50)), chat)
        assert len(rows) == 45
        assert not cache.exists()

    @pytest.mark.parametrize("kind", [PreferenceDataModule, PromptDataModule, DemonstrationDataModule])
    def test_rows_are_those_that_would_be_in_memory(self, chat, jsonl, cache, monkeypatch, caplog, kind):
        source = jsonl(pairs(50, prompt=""))
        in_file = list(load(source, chat, kind))
        remarks = caplog.messages[:]
        assert len(list(cache.iterdir())) == 1
        monkeypatch.setattr(store, "IN_MEMORY_BYTES", 10**6)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "none")
        caplog.clear()
        assert list(load(source, chat, kind)) == in_file
        assert caplog.messages == remarks
        assert remarks[-2:] == [
            f"{source}: skipped 1 bad rows, the first of them Row 1 of {source}: the prompt in `prompt` is empty.",
            f"{source}: dropped 5 prompts of more than 60 tokens.",
        ]
        assert (f"in 25 of 49 pairs ({CONSTANT!r}..." in caplog.text) == (kind is PreferenceDataModule)

    def test_a_second_run_tokenizes_nothing_and_repeats_the_remarks(self, chat, jsonl, cache, monkeypatch, caplog):
        source = jsonl(pairs(50, prompt=""))
        first, remarks = list(load(source, chat)), caplog.messages[:]
        caplog.clear()
        monkeypatch.setattr(store, "_tokenize", None)
        assert list(load(source, ChatTokenizer(tiny_tokenizer()))) == first
        assert caplog.messages == remarks
        assert len(remarks) == 3

    def test_whatever_changes_the_rows_makes_another_file(self, chat, jsonl, cache):
        source = jsonl(pairs(50))
        other = tiny_tokenizer()
        other.add_tokens(["cannot"])
        turned = ChatTokenizer(tiny_tokenizer(), chat_template=CHATML.replace("\n", " "))
        load(source, chat)
        load(source, chat, kind=PromptDataModule)
        load(source, chat, kind=DemonstrationDataModule)
        load(source, chat, max_prompt_tokens=61)
        load(source, chat, max_response_tokens=5)
        load(source, chat, max_eval_rows=49)
        load(source, chat, bad_rows="error")
        load(source, turned)
        load(source, ChatTokenizer(other))
        os.utime(source, (1, 1))
        load(source, chat)
        load(jsonl(pairs(50), "copy.jsonl"), chat)
        assert len(list(cache.iterdir())) == 11
        load(source, chat, eval_batch_size=3, num_workers=1, tokenize_workers=2, seed=9)  # these do not
        assert len(list(cache.iterdir())) == 11

    def test_an_error_leaves_nothing_behind(self, chat, jsonl, cache):
        rows = pairs(50)
        rows[48]["chosen"] = ""
        with pytest.raises(UserError, match=r"Row 49 of .*rows\.jsonl: the answer in `chosen` is empty"):
            load(jsonl(rows), chat, bad_rows="error")
        assert list(cache.iterdir()) == []

    def test_who_is_second_leaves_the_file_of_the_first(self, chat, jsonl, cache, monkeypatch):
        source = jsonl(pairs(50))
        behind = store._write

        def overtaken(*args):
            monkeypatch.setattr(store, "_write", behind)
            load(source, chat)
            behind(*args)

        monkeypatch.setattr(store, "_write", overtaken)
        rows = load(source, chat)
        [folder] = cache.iterdir()
        assert rows.table.path == str(folder / store.ROWS)
        assert len(rows) == 45

    @pytest.mark.parametrize(
        "name, content",
        [
            ("ROWS", lambda whole: b""),
            ("ROWS", lambda whole: whole[:-1]),
            ("ROWS", lambda whole: whole[: len(whole) // 2]),
            ("ROWS", lambda whole: bytes(len(whole))),
            ("ROWS", None),
            ("ABOUT", lambda whole: b""),
            ("ABOUT", lambda whole: b"[]"),
            ("ABOUT", lambda whole: b"{}"),
            ("ABOUT", lambda whole: b"\xff"),
            ("ABOUT", None),
        ],
    )
    def test_a_damaged_file_is_made_anew(self, chat, jsonl, cache, caplog, name, content):
        source = jsonl(pairs(50))
        whole = list(load(source, chat))
        [folder] = cache.iterdir()
        path = folder / getattr(store, name)
        damaged = content(path.read_bytes()) if content else None
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        caplog.clear()
        assert list(load(source, chat)) == whole
        assert caplog.messages[0].startswith(f"{folder} is damaged (")
        caplog.clear()
        assert list(load(source, chat)) == whole
        assert "is damaged" not in caplog.text

    def test_a_damaged_file_that_cannot_be_replaced_is_named(self, chat, jsonl, cache, monkeypatch):
        source = jsonl(pairs(50))
        load(source, chat)
        [folder] = cache.iterdir()
        (folder / store.ABOUT).write_text("{}")
        monkeypatch.setattr(store.shutil, "rmtree", lambda folder, ignore_errors: None)
        with pytest.raises(UserError, match=rf"{folder} is damaged \(.*\) and cannot be replaced; delete it\."):
            load(source, chat)

    def test_a_full_disk_is_told_and_leaves_nothing(self, chat, jsonl, cache, monkeypatch):
        def full(descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"cannot be written to .* \(.*No space left.*\); set HF_DATASETS_CACHE to"):
            load(jsonl(pairs(50)), chat)
        assert list(cache.iterdir()) == []

    @pytest.mark.parametrize("in_memory", [100, 10**6])
    @pytest.mark.parametrize("change", ["cut", "unlink"])
    def test_a_source_that_changes_while_it_is_read_is_refused(
        self, chat, jsonl, cache, monkeypatch, in_memory, change
    ):
        source = jsonl(pairs(50))
        monkeypatch.setattr(store, "IN_MEMORY_BYTES", in_memory)
        behind = store._tokenize_chunk

        def changing(*args):
            with suppress(FileNotFoundError):
                os.unlink(source) if change == "unlink" else os.truncate(source, 2000)
            return behind(*args)

        monkeypatch.setattr(store, "_tokenize_chunk", changing)
        with pytest.raises(UserError, match=r"rows\.jsonl changed while it was read; start again once nothing writes"):
            load(source, chat, tokenize_workers=1)
        assert not cache.exists() or list(cache.iterdir()) == []

    def test_a_folder_that_cannot_be_written_to_is_named(self, chat, jsonl, cache):
        cache.parent.mkdir()
        cache.touch()
        with pytest.raises(UserError, match=r"cannot be written to .*rto_lightning .*; set HF_DATASETS_CACHE to"):
            load(jsonl(pairs(50)), chat)


class TestWorkers:
    def test_more_processes_make_the_same_rows(self, chat, jsonl, cache, caplog):
        source = jsonl(pairs(50, prompt=""))
        alone, remarks = list(load(source, chat, tokenize_workers=1)), caplog.messages[:]
        for folder in cache.iterdir():
            (folder / store.ROWS).unlink()
            (folder / store.ABOUT).unlink()
            folder.rmdir()
        caplog.clear()
        assert list(load(source, chat, tokenize_workers=2)) == alone
        assert caplog.messages == remarks

    @pytest.mark.parametrize("workers", [1, 2])
    def test_the_first_bad_row_is_named(self, chat, jsonl, cache, workers):
        rows = pairs(50)
        rows[45]["chosen"] = rows[47]["rejected"] = ""
        with pytest.raises(UserError, match=r"Row 46 of .*rows\.jsonl: the answer in `chosen` is empty"):
            load(jsonl(rows), chat, bad_rows="error", tokenize_workers=workers)

    def test_one_that_is_killed_is_told(self, chat, jsonl, cache, monkeypatch):
        monkeypatch.setattr(store, "_tokenize_chunk", lambda *args: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(UserError, match=r"A process that tokenizes has died, .*; lower data\.tokenize_workers\."):
            load(jsonl(pairs(50)), chat, tokenize_workers=2)

    @pytest.mark.parametrize("bad_rows", ["error", "skip"])
    def test_rows_that_cannot_be_read_go_to_them(self, chat, tmp_path, cache, caplog, bad_rows):
        lines = ['{"prompt": "p", "chosen": "c", "rejected": "r"}'] * 30
        lines[20] = "{"
        lines[21] = lines[21][:-1] + ', "extra": ' + "[" * 90 + "]" * 90 + "}"
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(lines))
        if bad_rows == "skip":
            assert len(load(str(path), chat, tokenize_workers=2)) == 29
            assert f"skipped 1 bad rows, the first of them Row 21 of {path}: it is not JSON" in caplog.text
        else:
            with pytest.raises(UserError, match=r"^Row 21 of .*rows\.jsonl: it is not JSON \(.*\); correct it, or set"):
                load(str(path), chat, tokenize_workers=2, bad_rows="error")

    @pytest.mark.parametrize(("count", "processors", "pools"), [(12, 2, []), (13, 2, [2]), (13, 1, []), (13, 99, [16])])
    def test_left_open_they_start_with_many_rows(self, chat, jsonl, cache, monkeypatch, count, processors, pools):
        started = []

        def pool(workers, **settings):
            started.append(workers)
            return ProcessPoolExecutor(1, **settings)

        monkeypatch.setattr(store, "ProcessPoolExecutor", pool)
        monkeypatch.setattr(store, "_processors", lambda: processors)
        before = os.environ.get("TOKENIZERS_PARALLELISM")
        assert [row.index for row in load(jsonl(pairs(count)), chat)] == [n for n in range(count) if n != 7]
        assert started == pools
        assert os.environ.get("TOKENIZERS_PARALLELISM") == before


class TestPreparing:
    @pytest.mark.parametrize("in_memory", [100, 10**6])
    def test_rows_are_tokenized_once(self, chat, jsonl, cache, monkeypatch, in_memory):
        tokenized = []
        behind = store._tokenize

        def counting(tokenizer, *args):
            tokenized.append(tokenizer.table.name)
            return behind(tokenizer, *args)

        monkeypatch.setattr(store, "_tokenize", counting)
        monkeypatch.setattr(store, "IN_MEMORY_BYTES", in_memory)
        train, held_out = jsonl(pairs(40), "train.jsonl"), jsonl(pairs(30), "held_out.jsonl")
        data = PromptDataModule(train=train, validation=held_out, batch_size=4, max_prompt_tokens=60)
        settings = {"logger": False, "enable_checkpointing": False, "barebones": True, "max_steps": 1}
        Trainer(accelerator="cpu", devices=1, **settings).fit(Recorder(), data)
        assert tokenized == [train, held_out]
        assert (len(data.rows["train"]), len(data.rows["validation"])) == (36, 27)

    def test_other_processes_of_the_machine_find_the_file(self, chat, jsonl, cache, monkeypatch):
        source = jsonl(pairs(40))
        ranks = [PromptDataModule(train=source, batch_size=4, max_prompt_tokens=60) for _ in (0, 1)]
        for rank, data in enumerate(ranks):
            data.chat, data.trainer = chat, one_of(2, rank)
            data.trainer.state = SimpleNamespace(fn=TrainerFn.FITTING)
        ranks[0].prepare_data()
        monkeypatch.setattr(store, "_tokenize", None)
        for data in ranks:
            data.setup("fit")
        assert [len(data.rows["train"]) for data in ranks] == [36, 36]
        shares = [batch.index.tolist() for data in ranks for batch in data.train_dataloader()]
        assert len(set(chain(*shares))) == 36
