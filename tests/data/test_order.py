from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.progress import _ProcessedTracker

from rto_lightning.backbone.chat import ChatTokenizer
from rto_lightning.data.order import GlobalBatchSampler
from rto_lightning.data.prompts import PromptDataModule
from rto_lightning.errors import UserError
from tests.tiny import tiny_tokenizer


def numbered(count):
    return [{"prompt": f"p{i}"} for i in range(count)]


def batches_of(sampler):
    rows = list(sampler)
    assert len(rows) == len(sampler)
    return [rows[start : start + sampler.share] for start in range(0, len(rows), sampler.share)]


def one_of(world, rank, processed=0):
    """As much of a trainer as tells a data module that it is one of several processes, and how far they are."""
    total = _ProcessedTracker(processed=processed)
    progress = SimpleNamespace(batch_progress=SimpleNamespace(total=total))
    return SimpleNamespace(
        strategy=SimpleNamespace(distributed_sampler_kwargs={"num_replicas": world, "rank": rank}),
        fit_loop=SimpleNamespace(epoch_loop=progress),
        limit_train_batches=1.0,
    )


@given(
    share=st.integers(1, 4),
    world=st.integers(1, 5),
    rows=st.integers(0, 70),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 2**40),
)
def test_the_shares_of_a_batch_concatenated_are_the_batch_of_one_process(share, world, rows, epoch, seed):
    def batches(num_replicas, rank):
        sampler = GlobalBatchSampler(range(rows), share * world, num_replicas, rank, seed)
        sampler.set_epoch(epoch)
        return batches_of(sampler)

    alone = batches(1, 0)
    assert all(len(batch) == share * world for batch in alone)
    assert len(alone) == rows // (share * world)  # what does not fill a batch is left out
    assert len(set(chain(*alone))) == len(alone) * share * world
    shares = [batches(world, rank) for rank in range(world)]
    assert [list(chain(*parts)) for parts in zip(*shares, strict=True)] == alone


class TestDataModule:
    def epochs(self, chat, source, seed=0, count=1):
        """The rows of each batch of the first epochs, without a trainer."""
        data = PromptDataModule(train=source, batch_size=4, seed=seed)
        data.chat = chat
        data.setup("fit")
        loader = data.train_dataloader()
        for epoch in range(count):
            loader.sampler.set_epoch(epoch)
            yield [batch.index.tolist() for batch in loader]

    def test_full_batches_in_an_order_of_seed_and_epoch(self, chat, jsonl):
        source = jsonl(numbered(10))
        first, second = self.epochs(chat, source, count=2)
        assert [len(batch) for batch in first] == [4, 4]
        assert len(set(chain(*first))) == 8
        assert first != second
        assert list(self.epochs(chat, source, count=2)) == [first, second]
        assert list(self.epochs(chat, source, seed=1)) != [first]

    def test_each_process_takes_its_share(self, chat, jsonl):
        source = jsonl(numbered(10))
        first, second = self.epochs(chat, source, count=2)
        for processed, expected in ((0, first), (1, first[1:]), (2, second), (3, second[1:])):
            shares = []
            for rank in (0, 1):
                data = PromptDataModule(train=source, batch_size=4, seed=0)
                data.chat, data.trainer = chat, one_of(2, rank, processed)
                data.setup("fit")
                shares.append([batch.index.tolist() for batch in data.train_dataloader()])
            assert [[*left, *right] for left, right in zip(*shares, strict=True)] == expected

    def test_a_batch_larger_than_the_data_is_an_error(self, chat, jsonl):
        with pytest.raises(UserError, match=r"data\.batch_size 4 is larger than the data: .* gives 3 rows; lower it"):
            next(self.epochs(chat, jsonl(numbered(3))))

    @pytest.mark.parametrize(
        ("batch_size", "world", "such_as"), [(8, 3, "6 or 9"), (2, 4, "4"), (1, 2, "2"), (6, 4, "4 or 8")]
    )
    def test_a_batch_that_cannot_be_shared_equally_is_refused(self, chat, jsonl, batch_size, world, such_as):
        data = PromptDataModule(train=jsonl(numbered(12)), batch_size=batch_size)
        data.chat, data.trainer = chat, one_of(world, 0)
        with pytest.raises(UserError, match=rf"batch_size {batch_size}, .* {world} devices; .* such as {such_as}\."):
            data.setup("fit")

    def test_other_stages_do_not_share_training_batches(self, chat, jsonl):
        data = PromptDataModule(test=jsonl(numbered(3)), batch_size=8, eval_batch_size=2)
        data.chat, data.trainer = chat, one_of(3, 0)
        data.setup("test")
        assert [len(batch) for batch in data.test_dataloader()] == [2, 1]  # Lightning puts its own sampler in


class Recorder(LightningModule):
    """Notes the rows it is trained on."""

    def __init__(self):
        super().__init__()
        self.chat = ChatTokenizer(tiny_tokenizer())
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.index.tolist())
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        self.validated = batch.index.tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class AfterValidation(ModelCheckpoint):
    """Has a state of its own; a second ModelCheckpoint of each epoch may not have."""


def fit(data, folder, ckpt_path=None, **settings):
    """Trains, with a checkpoint after each step and each epoch; returns the rows of each batch."""
    module = Recorder()
    every_step = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    every_epoch = ModelCheckpoint(folder, filename="epoch-{step}", save_top_k=-1, save_on_train_epoch_end=True)
    after_validation = AfterValidation(folder, filename="val-{step}", save_top_k=-1, save_on_train_epoch_end=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[every_step, every_epoch, after_validation],
        **{"max_epochs": -1, **settings},
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    assert ("validation" in data.rows) == hasattr(module, "validated")
    return module.seen


@pytest.mark.filterwarnings("error:.*(not resumable|across ranks is zero)")
@pytest.mark.filterwarnings("ignore:(The dirpath has changed|Checkpoint directory)")
class TestResuming:
    """12 rows in batches of 4: 3 batches an epoch."""

    @pytest.mark.parametrize(("workers", "validation"), [(0, False), (0, True), (1, True)])
    def test_every_kind_of_checkpoint_goes_on_with_the_rows_that_follow(self, jsonl, tmp_path, workers, validation):
        source = jsonl(numbered(12))

        def data():
            held_out = source if validation else None
            return PromptDataModule(
                train=source, validation=held_out, batch_size=4, eval_batch_size=12, num_workers=workers
            )

        whole = fit(data(), tmp_path, max_steps=8)
        assert len(whole) == 8
        assert sorted(chain(*whole[:3])) == sorted(chain(*whole[3:6])) == list(range(12))
        names = ["step=2", "step=3", "step=4", "epoch-step=3", *(["val-step=3"] if validation else [])]
        for name in names:
            step = int(name[-1])
            resumed = fit(data(), tmp_path / "resumed" / name, tmp_path / f"{name}.ckpt", max_steps=8)
            assert resumed == whole[step:], name

    def test_a_run_that_ended_with_an_epoch_can_be_lengthened(self, jsonl, tmp_path):
        source = jsonl(numbered(12))
        whole = fit(PromptDataModule(train=source, batch_size=4), tmp_path, max_steps=8)
        fit(PromptDataModule(train=source, batch_size=4), tmp_path / "short", max_steps=3)
        for name in ("step=3", "epoch-step=3"):
            checkpoint = tmp_path / "short" / f"{name}.ckpt"
            data = PromptDataModule(train=source, batch_size=4)
            once = fit(data, tmp_path / name / "once", checkpoint, max_steps=5)
            assert once == whole[3:5], name
            # and again, now that the counters are those of a resumed run
            for again in ("step=5", "step=4"):
                data = PromptDataModule(train=source, batch_size=4)
                resumed = fit(data, tmp_path / name / again, tmp_path / name / "once" / f"{again}.ckpt", max_steps=8)
                assert resumed == whole[int(again[-1]) :], (name, again)

    def test_by_epochs(self, jsonl, tmp_path):
        source = jsonl(numbered(12))
        whole = fit(PromptDataModule(train=source, batch_size=4), tmp_path, max_epochs=3)
        assert len(whole) == 9
        for name in ("step=2", "epoch-step=3", "step=6"):
            checkpoint = tmp_path / f"{name}.ckpt"
            resumed = fit(PromptDataModule(train=source, batch_size=4), tmp_path / name, checkpoint, max_epochs=3)
            assert resumed == whole[int(name[-1]) :], name

    def test_shortened_epochs(self, jsonl, tmp_path):
        source = jsonl(numbered(12))
        limit = {"limit_train_batches": 2, "max_steps": 6}
        whole = fit(PromptDataModule(train=source, batch_size=4), tmp_path, **limit)
        full = fit(PromptDataModule(train=source, batch_size=4), tmp_path / "full", max_steps=5)
        assert (whole[:2], whole[2:4]) == (full[:2], full[3:5])
        for name in ("step=1", "step=2", "epoch-step=2", "step=3"):
            checkpoint = tmp_path / f"{name}.ckpt"
            resumed = fit(PromptDataModule(train=source, batch_size=4), tmp_path / name, checkpoint, **limit)
            assert resumed == whole[int(name[-1]) :], name

    def test_on_another_number_of_processes(self, jsonl, tmp_path):
        source = jsonl(numbered(12))
        whole = fit(PromptDataModule(train=source, batch_size=4, seed=0), tmp_path, max_steps=5)
        progress = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["loops"]["fit_loop"]
        trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
        trainer.fit_loop.load_state_dict(progress)
        samplers = [GlobalBatchSampler(range(12), 4, 2, rank, seed=0) for rank in (0, 1)]
        for sampler in samplers:
            sampler.follow(trainer)
        shares = [list(sampler)[:2] for sampler in samplers]
        assert [*shares[0], *shares[1]] == whole[4]
