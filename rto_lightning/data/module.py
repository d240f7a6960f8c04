"""What the three data modules share: sources, tokenizing, loaders, and the order of the training data."""

import warnings
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.loops.progress import _ProcessedTracker
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from rto_lightning.backbone.chat import ChatTokenizer
from rto_lightning.data.formats import BadRows, BadRowsSetting, Prompt, warn
from rto_lightning.data.sources import Table, load_table
from rto_lightning.errors import UserError
from rto_lightning.seeding import run_seed

_SOURCES_OF_STAGE = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}
_CHUNK = 1000
"""Rows that are tokenized at once: enough to keep the tokenizer's threads busy, few enough for memory."""


class ChatDataModule(LightningDataModule):
    """Conversations from up to four sources, tokenized when a stage begins.

    A source is `NAME_OR_PATH[:SPLIT]`: a .jsonl, .json, .csv or .parquet file, a folder that
    `datasets.save_to_disk` wrote, or a data set of the Hugging Face hub.

    Args:
        train: Source to train on.
        validation: Source for `validate` and for validation during training; None for none.
        test: Source for `test`.
        predict: Source for `predict`.
        max_prompt_tokens: Longer prompts are dropped, and their number is logged.
        batch_size: Rows of a training batch, on each device.
        eval_batch_size: Rows of every other batch; None for `batch_size`.
        max_train_rows: Only the first this many rows of `train`; None for all.
        max_eval_rows: Only the first this many rows of each other source; None for all.
        bad_rows: `error` stops at the first row that is empty or malformed, `skip` leaves such rows out and
            logs their number.
        num_workers: Processes that put batches together; 0 does it in the main one.
        seed: The order of the training rows follows from it and the epoch; null takes `seed_everything`.
    """

    chat: ChatTokenizer | None = None
    """Tokenizes. None for the one of the trainer's LightningModule; set it to work without a trainer."""

    def __init__(
        self,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        max_prompt_tokens: int = 512,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_train_rows: int | None = None,
        max_eval_rows: int | None = None,
        bad_rows: BadRowsSetting = "error",
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.sources = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.max_prompt_tokens = max_prompt_tokens
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.max_train_rows = max_train_rows
        self.max_eval_rows = max_eval_rows
        self.bad_rows = bad_rows
        self.num_workers = num_workers
        self.seed = run_seed(seed)
        self.rows: dict[str, list[Any]] = {}
        """The tokenized rows of each source that a stage has needed so far."""
        for name in ("max_prompt_tokens", "batch_size", "eval_batch_size", "max_train_rows", "max_eval_rows"):
            _check_positive(name, getattr(self, name))

    def setup(self, stage: str) -> None:
        """Loads and tokenizes what a stage needs.

        Args:
            stage: `fit` (train and validation), `validate`, `test` or `predict`.

        Raises:
            UserError: If a source is not given, cannot be used, or leaves no row.
        """
        for name in _SOURCES_OF_STAGE[stage]:
            source = self.sources[name]
            if source is not None:
                self.rows[name] = self._load(source, self.max_train_rows if name == "train" else self.max_eval_rows)
            elif (stage, name) != ("fit", "validation"):
                raise UserError(
                    f"data.{name} is not set; give it a file, a folder or the name of a data set "
                    "(NAME_OR_PATH[:SPLIT])."
                )
        if stage == "fit" and len(self.rows["train"]) // self._replicas()["num_replicas"] < self.batch_size:
            raise UserError(
                f"data.batch_size {self.batch_size} is larger than the data: {self.sources['train']} gives "
                f"{len(self.rows['train'])} rows to {self._replicas()['num_replicas']} device(s); lower it."
            )

    def train_dataloader(self) -> DataLoader[Any]:
        """Full batches of the training rows, shuffled anew in each epoch."""
        rows = self.rows["train"]
        sampler = ResumableSampler(rows, **self._replicas(), seed=self.seed)
        if self.trainer is not None:
            sampler.resume(self.trainer, self.batch_size)
        return self._loader(rows, self.batch_size, ResumableLoader, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The validation rows in order; an empty list if there is no such source."""
        if "validation" not in self.rows:
            # Lightning takes an empty list for no validation, but warns of it.
            warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")
            return []
        return self._loader(self.rows["validation"], self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        """The test rows in order."""
        return self._loader(self.rows["test"], self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The rows to predict, in order."""
        return self._loader(self.rows["predict"], self.eval_batch_size)

    # What a kind of data defines.

    @abstractmethod
    def read(self, table: Table, bad_rows: BadRows) -> Sequence[tuple[int, Prompt]]:
        """The usable rows of a table as examples, each with its index."""

    @abstractmethod
    def tokenize(
        self, chat: ChatTokenizer, examples: Sequence[tuple[int, Any]], prompts: Sequence[array]
    ) -> Sequence[Any]:
        """Examples to rows that `collate` can batch.

        Args:
            chat: The tokenizer.
            examples: (index, example) pairs.
            prompts: Ids of the examples' prompts.
        """

    @abstractmethod
    def collate(self, chat: ChatTokenizer) -> Callable[[list[Any]], Any]:
        """A function that puts rows into a batch; it must be picklable for the workers."""

    # The work.

    def _load(self, source: str, max_rows: int | None) -> list[Any]:
        chat = self._find_chat()
        bad_rows = BadRows(source, self.bad_rows)
        examples = self.read(load_table(source, max_rows), bad_rows)
        rows: list[Any] = []
        too_long = 0
        for start in range(0, len(examples), _CHUNK):
            kept = []
            for index, example, prompt in _encode_prompts(chat, examples[start : start + _CHUNK], bad_rows):
                if len(prompt) > self.max_prompt_tokens:
                    too_long += 1
                else:
                    kept.append((index, example, prompt))
            rows += self.tokenize(chat, [(i, example) for i, example, _ in kept], [p for _, _, p in kept])
        bad_rows.log()
        if too_long:
            warn(f"{source}: dropped {too_long} prompts of more than {self.max_prompt_tokens} tokens.")
        if not rows:
            raise UserError(
                f"{source} has no usable row: {bad_rows.count} are bad and {too_long} have a prompt of "
                f"more than data.max_prompt_tokens = {self.max_prompt_tokens} tokens; correct them or raise "
                "the limit."
            )
        return rows

    def _find_chat(self) -> ChatTokenizer:
        if self.chat is not None:
            return self.chat
        if self.trainer is None:
            raise RuntimeError("there is no trainer to take the tokenizer from: set `chat` to a ChatTokenizer")
        chat = self.trainer.lightning_module.chat
        assert isinstance(chat, ChatTokenizer)
        return chat

    def _replicas(self) -> dict[str, int]:
        """How many processes share the training rows, and which of them this is."""
        strategy = None if self.trainer is None else self.trainer.strategy
        return getattr(strategy, "distributed_sampler_kwargs", {"num_replicas": 1, "rank": 0})

    def _loader(
        self, rows: list[Any], batch_size: int, kind: type[DataLoader[Any]] = DataLoader, **settings: Any
    ) -> DataLoader[Any]:
        collate = self.collate(self._find_chat())
        workers = self.num_workers
        return kind(rows, batch_size=batch_size, num_workers=workers, collate_fn=collate, **settings)  # type: ignore[arg-type]


class AnswerDataModule(ChatDataModule):
    """Conversations with answers.

    Args:
        max_response_tokens: Longer answers are cut from the right, and then carry no stop token.
        **settings: As for every data module.
    """

    def __init__(self, max_response_tokens: int = 512, **settings: Any) -> None:
        super().__init__(**settings)
        self.max_response_tokens = max_response_tokens
        _check_positive("max_response_tokens", max_response_tokens)

    def encode_answers(self, chat: ChatTokenizer, texts: Sequence[str]) -> list[array]:
        """Ids of answers, cut at the limit."""
        return [compact(ids) for ids in chat.encode_responses(texts, self.max_response_tokens)]


class ResumableSampler(DistributedSampler[Any]):
    """Shuffles by (seed, epoch), shares the rows among processes, and can begin within an epoch.

    Lightning calls `set_epoch` before each epoch, and does not replace a DistributedSampler by its own.
    """

    def __init__(self, rows: Sequence[Any], num_replicas: int, rank: int, seed: int) -> None:
        super().__init__(rows, num_replicas, rank, shuffle=True, seed=seed, drop_last=True)  # type: ignore[arg-type]
        self.skip = 0
        """Rows that the next pass leaves out at its start."""

    def __iter__(self) -> Iterator[int]:
        skip, self.skip = self.skip, 0
        yield from list(super().__iter__())[skip:]

    def resume(self, trainer: Trainer, batch_size: int) -> None:
        """Moves to where a restored trainer stopped; does nothing on a fresh one.

        Lightning restores how many batches were processed, not the loader's position.
        """
        epochs = trainer.fit_loop.epoch_progress.current
        batches = trainer.fit_loop.epoch_loop.batch_progress
        assert isinstance(epochs, _ProcessedTracker) and isinstance(batches.current, _ProcessedTracker)
        if not trainer.fit_loop.epoch_loop.restarting:
            return
        if batches.is_last_batch:  # saved at the end of an epoch, perhaps before that was counted
            self.set_epoch(max(epochs.processed, epochs.started))
        else:
            self.set_epoch(epochs.processed)
            self.skip = batches.current.processed * batch_size


class ResumableLoader(DataLoader[Any]):
    """Tells Lightning that a run can resume within an epoch: the sampler's position follows the trainer's."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: see `ResumableSampler.resume`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


def compact(ids: Sequence[int]) -> array:
    """Ids in four bytes each; a list of ints takes nine times as many."""
    return array("i", ids)


def _encode_prompts(
    chat: ChatTokenizer, examples: Sequence[tuple[int, Prompt]], bad_rows: BadRows
) -> list[tuple[int, Any, array]]:
    """Examples with the ids of their prompts, without those that the chat template refuses."""
    try:
        prompts = chat.encode_prompts([example.prompt for _, example in examples])
    except UserError as error:
        if len(examples) == 1:
            bad_rows.add(examples[0][0], f"the chat template refuses its prompt ({error.__cause__})")
            return []
        return [row for example in examples for row in _encode_prompts(chat, [example], bad_rows)]
    return [(index, example, compact(ids)) for (index, example), ids in zip(examples, prompts, strict=True)]


def _check_positive(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UserError(f"data.{name} is {value}; set it to 1 or more.")
