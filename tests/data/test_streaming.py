from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rto_lightning.data import PreferenceDataModule, PromptDataModule
from rto_lightning.data.streaming import shuffle
from rto_lightning.errors import UserError
from tests.data.test_order import fit, numbered, one_of

LONG = "?" * 60


def mixed(count):
    """Every third prompt is too long."""
    return [{"prompt": f"p{n}" + LONG * (n % 3 == 0)} for n in range(count)]


def loader(chat, source, world=1, rank=0, kind=PromptDataModule, trainer=None, **settings):
    defaults = {"batch_size": 4, "max_prompt_tokens": 60, "shuffle_buffer_rows": 8, "streaming": True}
    data = kind(train=source, **{**defaults, **settings})
    data.chat = chat
    data.trainer = trainer
    if world > 1:
        data.trainer = SimpleNamespace(**vars(one_of(world, rank)), max_steps=9, overfit_batches=0)
    data.setup("fit")
    return data.train_dataloader()


def indices(batches):
    return [batch.index.tolist() for batch in batches]


@given(st.integers(0, 40), st.integers(1, 50), st.integers(0, 2**40))
def test_shuffling_keeps_all_items(count, buffer_size, seed):
    shuffled = list(shuffle(range(count), buffer_size, seed))
    assert sorted(shuffled) == list(range(count))
    assert shuffled == list(shuffle(range(count), buffer_size, seed))
    assert all(place > item - buffer_size for place, item in enumerate(shuffled))  # no farther ahead than the buffer
    if buffer_size == 1:
        assert shuffled == list(range(count))


def test_an_order_is_that_of_its_seed():
    assert len({tuple(shuffle(range(20), 10, seed)) for seed in range(10)}) == 10


class TestBatches:
    def test_full_batches_of_usable_rows_pass_after_pass(self, chat, jsonl):
        stream = loader(chat, jsonl(mixed(22)))
        first, second = indices(stream), indices(stream)
        usable = [n for n in range(22) if n % 3]
        for batches in (first, second):
            assert [len(batch) for batch in batches] == [4, 4, 4]
            assert len(set(chain(*batches)) & set(usable)) == 12
        assert first != second
        assert indices(loader(chat, jsonl(mixed(22)))) == first
        assert indices(loader(chat, jsonl(mixed(22)), seed=1)) != first

    def test_a_buffer_of_one_row_keeps_the_order(self, chat, jsonl):
        assert indices(loader(chat, jsonl(numbered(9)), shuffle_buffer_rows=1)) == [[0, 1, 2, 3], [4, 5, 6, 7]]

    @pytest.mark.parametrize("world", [2, 4])
    def test_the_shares_of_a_batch_concatenated_are_the_batch_of_one_process(self, chat, jsonl, world):
        source = jsonl(mixed(200))
        alone = indices(loader(chat, source))
        shares = [indices(loader(chat, source, world, rank)) for rank in range(world)]
        assert [list(chain(*parts)) for parts in zip(*shares, strict=True)] == alone
        assert len(alone) == 33

    @pytest.mark.parametrize("workers", [1, 2])
    def test_workers_change_nothing(self, chat, jsonl, workers):
        source = jsonl(mixed(70))
        assert indices(loader(chat, source, num_workers=workers)) == indices(loader(chat, source))

    def test_a_batch_is_that_of_held_rows(self, chat, jsonl):
        source = jsonl([{"prompt": f"p{n}", "chosen": f"c{n}", "rejected": f"r{n}"} for n in range(9)])
        [streamed, *_] = loader(chat, source, kind=PreferenceDataModule, shuffle_buffer_rows=1)
        data = PreferenceDataModule(test=source, batch_size=4)
        data.chat = chat
        data.setup("test")
        [held, *_] = data.test_dataloader()
        assert streamed.index.tolist() == held.index.tolist()
        assert streamed.sequences.input_ids.tolist() == held.sequences.input_ids.tolist()
        assert streamed.cluster.tolist() == held.cluster.tolist()

    def test_only_the_first_rows(self, chat, jsonl):
        assert sorted(chain(*indices(loader(chat, jsonl(numbered(20)), max_train_rows=8)))) == list(range(8))


class TestSources:
    def test_shards_of_lines(self, chat, jsonl, tmp_path):
        for n in range(3):
            jsonl(numbered(5), f"{n}.jsonl")
        for source in (f"{tmp_path}/*.jsonl", str(tmp_path)):
            assert sorted(chain(*indices(loader(chat, source, batch_size=5)))) == list(range(15))

    def test_shards_of_parquet(self, chat, tmp_path):
        for n in range(3):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(numbered(5)), tmp_path / f"{n}.parquet")
        assert sorted(chain(*indices(loader(chat, str(tmp_path), batch_size=5)))) == list(range(15))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_the_hub(self, chat, monkeypatch, workers):
        calls = []

        def load_dataset(name, **settings):
            calls.append(settings)
            return datasets.Dataset.from_list(numbered(15)).to_iterable_dataset(num_shards=3)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        stream = loader(chat, "org/prompts:train", batch_size=5, num_workers=workers)
        assert sorted(chain(*indices(stream))) == list(range(15))
        assert calls == [{"split": "train", "streaming": True}]


@pytest.mark.filterwarnings("error:.*(not resumable|across ranks is zero)")
@pytest.mark.filterwarnings("ignore:(The dirpath has changed|Checkpoint directory)")
class TestResuming:
    """14 of 21 rows are usable: 3 batches a pass."""

    def data(self, source, **settings):
        defaults = {"batch_size": 4, "max_prompt_tokens": 60, "shuffle_buffer_rows": 8, "streaming": True}
        return PromptDataModule(train=source, **{**defaults, **settings})

    @pytest.mark.parametrize("workers", [0, 1])
    def test_every_kind_of_checkpoint_goes_on_with_the_rows_that_follow(self, chat, jsonl, tmp_path, workers):
        source = jsonl(mixed(21))
        whole = fit(self.data(source, num_workers=workers), tmp_path, max_steps=8)
        stream = loader(chat, source)
        assert whole == [*indices(stream), *indices(stream), *indices(stream)][:8]
        for name in ("step=2", "step=3", "epoch-step=3", "step=4", "step=6"):
            data = self.data(source, num_workers=workers)
            resumed = fit(data, tmp_path / name, tmp_path / f"{name}.ckpt", max_steps=8)
            assert resumed == whole[int(name[-1]) :], name

    def test_a_run_that_ended_with_a_pass_can_be_lengthened_twice(self, jsonl, tmp_path):
        source = jsonl(mixed(21))
        whole = fit(self.data(source), tmp_path, max_steps=8)
        fit(self.data(source), tmp_path / "a", max_steps=3)
        once = fit(self.data(source), tmp_path / "b", tmp_path / "a" / "epoch-step=3.ckpt", max_steps=5)
        twice = fit(self.data(source), tmp_path / "c", tmp_path / "b" / "step=5.ckpt", max_steps=8)
        assert [*once, *twice] == whole[3:]

    @pytest.mark.parametrize("limit", [2, 3])
    def test_shortened_epochs_go_on_in_the_stream(self, jsonl, tmp_path, limit):
        source = jsonl(mixed(21))
        whole = fit(self.data(source), tmp_path / "whole", max_steps=7)
        assert fit(self.data(source), tmp_path, max_steps=7, limit_train_batches=limit) == whole
        for name in ("step=1", "step=2", f"epoch-step={limit}", "step=3", "step=4"):
            checkpoint = tmp_path / f"{name}.ckpt"
            resumed = fit(self.data(source), tmp_path / name, checkpoint, max_steps=7, limit_train_batches=limit)
            assert resumed == whole[int(name[-1]) :], name

    def test_validation_is_not_streamed(self, jsonl, tmp_path):
        held_out = jsonl(numbered(3), "held_out.jsonl")
        data = self.data(jsonl(mixed(21)), validation=held_out)
        assert len(fit(data, tmp_path, max_steps=4, val_check_interval=2, check_val_every_n_epoch=None)) == 4
        assert set(data.rows) == {"validation"}

    def test_on_another_number_of_processes(self, chat, jsonl):
        source = jsonl(mixed(21))
        stream = loader(chat, source)
        list(stream)
        begun = list(islice(stream, 1))
        state = stream.state_dict()
        following = indices(stream)
        assert (len(begun), len(following), state["epoch"]) == (1, 2, 1)
        shares = []
        for rank in (0, 1):
            resumed = loader(chat, source, 2, rank)
            resumed.trainer.fit_loop.epoch_loop.batch_progress.total.processed = state["processed"]
            resumed.load_state_dict(state)
            shares.append(indices(resumed))
        assert [[*left, *right] for left, right in zip(*shares, strict=True)] == following

    def test_a_checkpoint_of_held_rows_has_no_place_in_a_stream(self, jsonl, tmp_path):
        source = jsonl(mixed(21))
        fit(self.data(source, streaming=False), tmp_path, max_steps=2)
        with pytest.raises(UserError, match=r"of a run without data\.streaming, so its place in the stream is unknown"):
            fit(self.data(source), tmp_path / "resumed", tmp_path / "step=2.ckpt", max_steps=4)


class TestRefusals:
    def trainer(self, **settings):
        defaults = {"max_steps": 9, "overfit_batches": 0, "strategy": None}
        return SimpleNamespace(**{**defaults, **settings})

    def test_a_run_needs_an_end(self, chat, jsonl):
        with pytest.raises(UserError, match=r"the number of rows is unknown; set trainer\.max_steps\."):
            loader(chat, jsonl(numbered(9)), trainer=self.trainer(max_steps=-1))

    def test_no_overfitting(self, chat, jsonl):
        with pytest.raises(UserError, match=r"overfit_batches because rows are read once"):
            loader(chat, jsonl(numbered(9)), trainer=self.trainer(overfit_batches=1))

    def test_a_batch_that_cannot_be_shared(self, chat, jsonl):
        with pytest.raises(UserError, match=r"cannot be shared equally by 3 devices"):
            loader(chat, jsonl(numbered(9)), world=3)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_batch_larger_than_the_data(self, chat, jsonl, workers):
        stream = loader(chat, jsonl(mixed(5)), num_workers=workers)
        with pytest.raises(UserError, match=r"^data\.batch_size 4 is larger than the data: .*rows\.jsonl has fewer"):
            list(stream)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_bad_row_is_named(self, chat, jsonl, workers):
        rows = numbered(1500)
        rows[1400]["prompt"] = ""
        stream = loader(chat, jsonl(rows), num_workers=workers, batch_size=100)
        with pytest.raises(UserError, match=r"^Row 1401 of .*rows\.jsonl: the prompt in `prompt` is empty; correct it"):
            list(stream)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_bad_rows_behind_the_last_batch_are_counted(self, chat, jsonl, caplog, workers):
        source = jsonl([*numbered(128), {"prompt": ""}])
        stream = loader(chat, source, num_workers=workers, bad_rows="skip", shuffle_buffer_rows=1)
        assert len(list(stream)) == 32
        bad = f"{source}: skipped 1 bad rows, the first of them Row 129 of {source}: the prompt in `prompt` is empty."
        assert caplog.messages == [bad, bad]

    def test_how_many_are_bad_is_told_before_the_pass_has_ended(self, chat, jsonl, caplog):
        rows = [{"prompt": "" if n % 2 else f"p{n}"} for n in range(400)]
        list(islice(loader(chat, jsonl(rows), bad_rows="skip", shuffle_buffer_rows=1), 48))
        counts = [message.split("skipped ")[1].split()[0] for message in caplog.messages]
        assert counts == ["32", "128"]  # 64 rows are read at a time

    def test_a_pass_without_a_batch_tells_why(self, chat, jsonl):
        rows = [{"prompt": ""}, {"prompt": LONG}, {"prompt": "Hi"}]
        with pytest.raises(
            UserError, match=r"fewer usable rows, 1 are bad \(the first is Row 1 of .*\) and 1 have a prompt"
        ):
            list(loader(chat, jsonl(rows), bad_rows="skip"))

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_file_that_is_gone_in_the_second_pass(self, chat, jsonl, workers):
        source = jsonl(numbered(9))
        stream = loader(chat, source, num_workers=workers)
        assert len(list(stream)) == 2
        Path(source).unlink()
        with pytest.raises(UserError, match=r"^.*rows\.jsonl cannot be read \(.*No such file or directory"):
            list(stream)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_or_skipped_and_counted(self, chat, jsonl, caplog, workers):
        rows = mixed(30)
        rows[7]["prompt"] = ""
        source = jsonl(rows)
        stream = loader(chat, source, num_workers=workers, bad_rows="skip")
        assert len(list(stream)) == 4
        bad = f"{source}: skipped 1 bad rows, the first of them Row 8 of {source}: the prompt in `prompt` is empty."
        assert caplog.messages == [bad, bad, f"{source}: dropped 10 prompts of more than 60 tokens."]
