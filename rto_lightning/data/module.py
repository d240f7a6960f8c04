"""What the three data modules share: sources, loaders, and what they hold of the rows."""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from rto_lightning.backbone.chat import ChatTokenizer
from rto_lightning.data.files import Row
from rto_lightning.data.formats import BadRowsSetting
from rto_lightning.data.order import GlobalBatchSampler, ResumableLoader, check_divisible
from rto_lightning.data.rows import TokenIds, TokenizedRows
from rto_lightning.data.sources import Table, load_table
from rto_lightning.data.store import tokenized_rows
from rto_lightning.data.streaming import StreamedBatches, StreamingLoader
from rto_lightning.data.tokenizing import Encoded, RowTokenizer, compact, in_parts, no_answers
from rto_lightning.errors import UserError
from rto_lightning.runs.signals import leave_signals_to_parent
from rto_lightning.seeding import run_seed

_SOURCES_OF_STAGE = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}


class ChatDataModule(LightningDataModule):
    """Conversations from up to four sources, tokenized when a stage begins.

    A source is `NAME_OR_PATH[:SPLIT]`: a .jsonl, .json, .csv or .parquet file; several of them as a pattern such as
    `shards/*.jsonl` or as their folder; a folder that `datasets.save_to_disk` wrote; or a data set of the Hugging
    Face hub. Tokenized rows of more than 64 MiB are kept in a file in the cache folder of `datasets`
    (HF_DATASETS_CACHE) and used again by later runs.

    Args:
        train: Source to train on.
        validation: Source for `validate` and for validation during training; None for none.
        test: Source for `test`.
        predict: Source for `predict`.
        max_prompt_tokens: Longer prompts are dropped, and their number is logged.
        batch_size: Rows of a training batch, over all devices: each takes an equal share of it.
        eval_batch_size: Rows of every other batch, on each device; None for `batch_size`.
        max_train_rows: Only the first this many rows of `train`; None for all.
        max_eval_rows: Only the first this many rows of each other source; None for all.
        bad_rows: `error` stops at the first row that is empty or malformed or cannot be read, `skip` leaves such rows
            out and logs their number.
        num_workers: Processes that put batches together; 0 does it in the main one.
        seed: The order of the training rows follows from it and the epoch; null takes `seed_everything`.
        tokenize_workers: Processes that tokenize; null for one up to 20,000 rows and then one a processor.
        streaming: Read the rows of `train` while training, instead of tokenizing all before; needs trainer.max_steps.
        shuffle_buffer_rows: Raw rows of a stream among which the next one is drawn; 1 leaves them in their order.
    """

    row: ClassVar[type[Any]]
    """The dataclass of the tokenized rows."""
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
        tokenize_workers: int | None = None,
        streaming: bool = False,
        shuffle_buffer_rows: int = 10_000,
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
        self.tokenize_workers = tokenize_workers
        self.streaming = streaming
        self.shuffle_buffer_rows = shuffle_buffer_rows
        self.rows: dict[str, TokenizedRows[Any]] = {}
        """The tokenized rows of each source that a stage has needed so far, but for a stream."""
        self._prepared: dict[str, TokenizedRows[Any]] = {}
        self._stream: RowTokenizer[Any, Any] | None = None
        positive = ("max_prompt_tokens", "batch_size", "eval_batch_size", "max_train_rows", "max_eval_rows")
        for name in (*positive, "tokenize_workers", "shuffle_buffer_rows"):
            _check_positive(name, getattr(self, name))

    def prepare_data(self) -> None:
        """Tokenizes what a stage needs, in one process of each machine while the others wait.

        They then find large sets in the cache, and tokenize small ones for themselves.
        """
        if self.trainer is None or self.trainer.state.fn is None:
            return
        stage = self.trainer.state.fn.value
        self._check(stage)
        self._prepared = {name: self._load(name) for name in self._held(stage)}

    def setup(self, stage: str) -> None:
        """Loads and tokenizes what a stage needs.

        Args:
            stage: `fit` (train and validation), `validate`, `test` or `predict`.

        Raises:
            UserError: If a source is not given, cannot be used, or leaves no row; if the devices cannot share a
                training batch equally; or if rows are to be streamed and the trainer's length depends on their number.
        """
        self._check(stage)
        for name in self._held(stage):
            self.rows[name] = self._prepared.pop(name) if name in self._prepared else self._load(name)
        if stage == "fit" and self.streaming:
            self._stream = self._tokenizer("train", streaming=True)
        elif stage == "fit" and len(self.rows["train"]) < self.batch_size:
            raise UserError(
                f"data.batch_size {self.batch_size} is larger than the data: {self.sources['train']} gives "
                f"{len(self.rows['train'])} rows; lower it."
            )

    def train_dataloader(self) -> DataLoader[Any]:
        """This process's shares of full batches of the training rows, shuffled anew in each epoch."""
        return self._train_loader(self.trainer)

    def first_epoch(self) -> DataLoader[Any]:
        """The batches of the first epoch from its start, wherever the trainer is."""
        return self._train_loader(None)

    def _train_loader(self, trainer: Trainer | None) -> DataLoader[Any]:
        shares = self._replicas()
        if self._stream is not None:
            collate, buffer_rows = self.collate(self._find_chat()), self.shuffle_buffer_rows
            stream = StreamedBatches(
                self._stream, collate, self.batch_size, **shares, seed=self.seed, buffer_rows=buffer_rows
            )
            return StreamingLoader(stream, self.num_workers, trainer)
        rows = self.rows["train"]
        sampler = GlobalBatchSampler(rows, self.batch_size, **shares, seed=self.seed)
        if trainer is not None:
            sampler.follow(trainer)
        return self._loader(rows, sampler.share, ResumableLoader, sampler=sampler, drop_last=True)

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

    def first_rows(self, number: int) -> Any:
        """The first rows of `validation`, or without it of `train`, as one batch, the same on every process.

        Args:
            number: at most this many rows.

        Raises:
            UserError: if there are only streamed rows, of which none is the first.
        """
        name = "validation" if "validation" in self.rows else "train"
        if name not in self.rows:
            raise UserError("the first rows of a stream cannot be told; set data.validation.")
        rows = self.rows[name]
        return self.collate(self._find_chat())([rows[index] for index in range(min(number, len(rows)))])

    # What a kind of data defines.

    @abstractmethod
    def reader(self, table: Table) -> Callable[[Row], Any]:
        """A function of `formats.py` that reads the rows of a table as examples."""

    @abstractmethod
    def encoder(self) -> Callable[[ChatTokenizer, Sequence[Encoded[Any]]], list[Any]]:
        """A function that makes rows of examples whose prompts are tokenized; picklable, for other processes."""

    @abstractmethod
    def collate(self, chat: ChatTokenizer) -> Callable[[list[Any]], Any]:
        """A function that puts rows into a batch; picklable, for other processes."""

    def row_settings(self) -> dict[str, Any]:
        """What the rows follow from besides the settings of every data module."""
        return {}

    def answers(self) -> Callable[[Any], Sequence[str]]:
        """A function that gives the texts of an example to look for repetitions in; picklable."""
        return no_answers

    # The work.

    def _check(self, stage: str) -> None:
        for name in _SOURCES_OF_STAGE[stage]:
            if self.sources[name] is None and (stage, name) != ("fit", "validation"):
                raise UserError(
                    f"data.{name} is not set; give it a file, a folder or the name of a data set "
                    "(NAME_OR_PATH[:SPLIT])."
                )
        if stage == "fit":
            check_divisible(self.batch_size, self._replicas()["num_replicas"])
            if self.streaming and self.trainer is not None and self.trainer.max_steps == -1:
                raise UserError(
                    "data.streaming does not go with a trainer without an end because the number of rows is unknown; "
                    "set trainer.max_steps."
                )
            if self.streaming and self.trainer is not None and self.trainer.overfit_batches:  # type: ignore[attr-defined]
                raise UserError(
                    "data.streaming does not go with trainer.overfit_batches because rows are read once; set "
                    "data.max_train_rows instead."
                )

    def _held(self, stage: str) -> list[str]:
        """The names of the sources of a stage whose rows are all tokenized at its start."""
        streamed = "train" if self.streaming else None
        return [name for name in _SOURCES_OF_STAGE[stage] if self.sources[name] is not None and name != streamed]

    def _load(self, name: str) -> TokenizedRows[Any]:
        settings = {"max_rows": self._max_rows(name), **self.row_settings()}
        return tokenized_rows(self._tokenizer(name), self.tokenize_workers, **settings)

    def _tokenizer(self, name: str, streaming: bool = False) -> RowTokenizer[Any, Any]:
        source = self.sources[name]
        assert source is not None
        table = load_table(source, self._max_rows(name), streaming)
        return RowTokenizer(
            table,
            self.reader(table),
            self.encoder(),
            self.answers(),
            self.row,
            self._find_chat(),
            self.max_prompt_tokens,
            self.bad_rows,
        )

    def _max_rows(self, name: str) -> int | None:
        return self.max_train_rows if name == "train" else self.max_eval_rows

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
        self, rows: TokenizedRows[Any], batch_size: int, kind: type[DataLoader[Any]] = DataLoader, **settings: Any
    ) -> DataLoader[Any]:
        collate = self.collate(self._find_chat())
        workers = {"num_workers": self.num_workers, "worker_init_fn": leave_signals_to_parent}
        return kind(rows, batch_size=batch_size, collate_fn=collate, **workers, **settings)  # type: ignore[arg-type]


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

    def row_settings(self) -> dict[str, Any]:
        """The limit of the answers."""
        return {"max_response_tokens": self.max_response_tokens}


def encode_answers(chat: ChatTokenizer, texts: Sequence[str], max_response_tokens: int) -> list[TokenIds]:
    """Ids of N answers, cut at the limit."""
    parts = in_parts(texts, len)
    return [compact(ids) for part in parts for ids in chat.encode_responses(part, max_response_tokens)]


def _check_positive(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UserError(f"data.{name} is {value}; set it to 1 or more.")
