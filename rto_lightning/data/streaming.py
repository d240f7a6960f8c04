"""Training batches from rows that are read once, in order, and never held: for sets of any size.

Every process reads all rows, shuffles them in a buffer and tokenizes their prompts, since prompts that are too long
must not count; of the batches that this gives it takes its share, as `order.py` has it, and tokenizes the rest of
that. So a batch holds the same rows on any number of devices, and a resumed run goes on with the batch that follows.
"""

import random
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Generic, TypeVar

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from rto_lightning.data.formats import Example, warn
from rto_lightning.data.order import check_divisible, processed_batches
from rto_lightning.data.rows import RowT
from rto_lightning.data.tokenizing import Counts, Encoded, RowTokenizer
from rto_lightning.errors import UserError
from rto_lightning.runs.signals import leave_signals_to_parent
from rto_lightning.seeding import derive_seed

Item = TypeVar("Item")

_ROWS_AT_ONCE = 64
"""Rows whose prompts are tokenized together."""


@dataclass(frozen=True)
class Position:
    """A place between two batches of a stream; the same on every process."""

    epoch: int = 0
    """Passes over the rows that are behind it."""
    rows: int = 0
    """Rows of the shuffled stream of this pass that are behind it, usable or not."""


@dataclass(frozen=True)
class Streamed:
    """A process's share of a batch, or what is behind the last one of a pass."""

    batch: Any
    """What the data module collated; None behind the last batch."""
    end: Position
    """Where the whole batch ends."""
    counts: Counts
    """Of the rows that were read in this pass up to it, or a little beyond."""


class StreamedBatches(IterableDataset[Streamed | UserError], Generic[Example, RowT]):
    """One pass over a table in the shares of one process.

    Each worker of a loader reads all rows too, and puts every n-th batch together. An error is yielded, as the last
    item, so that it does not reach the user wrapped in a worker's traceback.

    Args:
        tokenizer: Of the table.
        collate: Puts rows into a batch.
        batch_size: Rows of a batch over all processes.
        num_replicas: Processes that share each batch.
        rank: Which of them this is, from 0.
        seed: The order of a pass follows from it and the number of the pass.
        buffer_rows: Raw rows among which the next one is drawn; 1 leaves the rows in their order.
    """

    def __init__(
        self,
        tokenizer: RowTokenizer[Example, RowT],
        collate: Callable[[list[RowT]], Any],
        batch_size: int,
        num_replicas: int,
        rank: int,
        seed: int,
        buffer_rows: int,
    ) -> None:
        check_divisible(batch_size, num_replicas)
        self.tokenizer = tokenizer
        self.collate = collate
        self.batch_size = batch_size
        share = batch_size // num_replicas
        self.share = slice(rank * share, (rank + 1) * share)
        self.seed = seed
        self.buffer_rows = buffer_rows
        self.start = Position()
        """Where the next pass begins."""

    def __iter__(self) -> Iterator[Streamed | UserError]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        try:
            for rows, end, counts in islice(self._batches(), number, None, count):
                encoded = self.tokenizer.encode(self.tokenizer.chat, rows[self.share])
                yield Streamed(self.collate(encoded) if rows else None, end, counts)
        except UserError as error:
            yield error

    def _batches(self) -> Iterator[tuple[list[Encoded[Example]], Position, Counts]]:
        """Full batches of usable rows and an empty one, where each ends, and the counts up to there."""
        seed = derive_seed(self.seed, "stream", self.start.epoch)
        shuffled = shuffle(enumerate(self.tokenizer.table.rows), self.buffer_rows, seed)
        places = enumerate(islice(shuffled, self.start.rows, None), start=self.start.rows + 1)
        waiting: list[tuple[Encoded[Example], int]] = []
        counts, end = Counts(), self.start
        while rows := list(islice(places, _ROWS_AT_ONCE)):
            usable, of_rows = self.tokenizer.usable(row for _, row in rows)
            counts.add(of_rows)
            places_of = {index: place for place, (index, _) in rows}
            waiting += [(row, places_of[row.index]) for row in usable]
            while len(waiting) >= self.batch_size:
                batch, waiting = waiting[: self.batch_size], waiting[self.batch_size :]
                end = replace(self.start, rows=batch[-1][1])
                yield [row for row, _ in batch], end, _to_send(counts)
        if end.rows == 0:
            raise self._too_few(counts)
        yield [], end, _to_send(counts)

    def _too_few(self, counts: Counts) -> UserError:
        tokenizer = self.tokenizer
        return UserError(
            f"data.batch_size {self.batch_size} is larger than the data: {tokenizer.table.name} has fewer usable rows, "
            f"{tokenizer.unusable(counts)}; lower it, correct them or raise the limit."
        )


def _to_send(counts: Counts) -> Counts:
    """A copy without all answers but the commonest."""
    return replace(counts, answers=Counter(dict(counts.answers.most_common(1))))


def shuffle(items: Iterable[Item], buffer_size: int, seed: int) -> Iterator[Item]:
    """Items in an order that follows from the seed; each comes at most `buffer_size` - 1 places before its own.

    Args:
        items: Any number of items.
        buffer_size: How many are held, one of which is drawn next.
        seed: Of the draws.
    """
    draw, source = random.Random(seed), iter(items)
    buffer = list(islice(source, buffer_size))
    for item in source:
        at = draw.randrange(buffer_size)
        yield buffer[at]
        buffer[at] = item
    draw.shuffle(buffer)
    yield from buffer


class StreamingLoader(DataLoader[Any]):
    """The batches of a stream, pass after pass: each iteration goes on where the last processed batch ended.

    The remarks on the rows, such as how many were dropped, are logged at the end of the first pass; and how many are
    bad already when the first, the tenth, the hundredth and so on is met, since a pass may be longer than the run.

    Args:
        batches: The stream.
        num_workers: Processes that read it.
        trainer: Tells how many batches were processed, which is fewer than were read; None if every one is.
    """

    def __init__(self, batches: StreamedBatches[Any, Any], num_workers: int, trainer: Trainer | None) -> None:
        workers: dict[str, Any] = {"num_workers": num_workers, "worker_init_fn": leave_signals_to_parent}
        super().__init__(batches, batch_size=None, collate_fn=_same, **workers)
        self.batches = batches
        self.trainer = trainer
        self._read = 0
        self._remarked = False
        self._next_bad = 1
        """The number of bad rows to tell of next."""
        self._positions = {0: Position()}
        """Where the stream stands after so many batches; of those that were read and not yet processed."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if not (yield from self._one_pass()):  # it went on where a pass had ended
            yield from self._one_pass()

    def _one_pass(self) -> Generator[Any, None, int]:
        """What is left of a pass; returns how many batches that was."""
        self._read = first = self._processed()
        start = self._positions.setdefault(first, Position())
        self.batches.start = start
        counts = Counts()
        for item in super().__iter__():
            if isinstance(item, UserError):
                raise item
            counts = item.counts
            self._tell_bad(counts)
            if item.batch is None:
                break
            self._read += 1
            self._positions = {count: end for count, end in self._positions.items() if count >= self._processed()}
            self._positions[self._read] = item.end
            yield item.batch
        if not self._remarked:
            self._remarked = True
            for line in self.batches.tokenizer.remarks(counts):
                warn(line)
        self._positions[self._read] = Position(start.epoch + 1)
        return self._read - first

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands after the processed batches."""
        position = self._positions.get(self._processed(), Position())
        return {"processed": self._processed(), "epoch": position.epoch, "rows": position.rows}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to where a saved run stood.

        Raises:
            UserError: If its rows were not streamed.
        """
        if not state:
            raise UserError(
                "The checkpoint is of a run without data.streaming, so its place in the stream is unknown; resume it "
                "with data.streaming false, or start a new run with its role as model.trained."
            )
        self._positions = {state["processed"]: Position(state["epoch"], state["rows"])}

    def _processed(self) -> int:
        return self._read if self.trainer is None else processed_batches(self.trainer)

    def _tell_bad(self, counts: Counts) -> None:
        if counts.bad >= self._next_bad:
            warn(self.batches.tokenizer.bad_remark(counts))
            self._next_bad = 10 ** len(str(counts.bad))


def _same(item: Any) -> Any:
    return item
