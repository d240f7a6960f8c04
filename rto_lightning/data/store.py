"""Where tokenized rows are kept: a small set in memory, a large one in a file that is written once and then mapped.

The file is in a folder of the cache of Hugging Face's `datasets` (HF_DATASETS_CACHE), and named by all that its
rows follow from, so that it is found again by later runs and by other processes of this one.
"""

import hashlib
import json
import os
import shutil
import sys
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
from datasets.table import InMemoryTable, MemoryMappedTable
from tqdm import tqdm

from rto_lightning.backbone.chat import ChatTokenizer
from rto_lightning.data.files import RawRow, reason_of
from rto_lightning.data.formats import warn
from rto_lightning.data.rows import RowT, TokenizedRows, row_schema, to_arrow
from rto_lightning.data.tokenizing import Counts, RowTokenizer
from rto_lightning.errors import UserError

FORMAT = 2
"""To be raised when the same raw rows give other tokenized ones than before."""
IN_MEMORY_BYTES = 64 * 2**20
"""Up to this size tokenized rows are kept in memory."""
CHUNK_ROWS = 1000
"""Rows that are tokenized at once: enough to keep the tokenizer's threads busy, few enough for memory."""
ROWS_ALONE = 20_000
"""Rows that are tokenized by the main process before others are worth their start."""

MOST_WORKERS = 16
"""More than these wait for the one that reads."""
SECONDS_WITHOUT_BAR = 5.0
SECONDS_BETWEEN_LINES = 30.0
"""Of the bar, where it is no terminal that shows it."""
ROWS, ABOUT = "rows.arrow", "about.json"

Chunk = list[tuple[int, RawRow]]
"""Raw rows, each with its index in the table."""
TokenizedChunk = tuple[pa.RecordBatch, Counts]

_TOKENIZER_THREADS = "TOKENIZERS_PARALLELISM"


def tokenized_rows(tokenizer: RowTokenizer[Any, RowT], workers: int | None, **settings: Any) -> TokenizedRows[RowT]:
    """All usable rows of a table, tokenized, and the remarks on them logged; from the cache if they are there.

    Args:
        tokenizer: Of the table.
        workers: Processes that tokenize; None for one while rows are few, and then as many as there are processors.
        **settings: What the rows follow from besides what the tokenizer tells: values that JSON can hold.

    Raises:
        UserError: If no row is usable, if a row is bad and bad rows are errors, or if the file cannot be written.
    """
    key = _key(tokenizer, settings)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "rto_lightning" / key
    if folder.is_dir():
        try:
            return _read(folder, tokenizer.kind)
        except _DAMAGES as error:
            warn(f"{folder} is damaged ({reason_of(error)}); its rows are tokenized again.")
            shutil.rmtree(folder, ignore_errors=True)
    rows = _tokenize(tokenizer, workers, folder)
    try:
        return _read(folder, tokenizer.kind) if rows is None else rows
    except _DAMAGES as error:
        raise UserError(f"{folder} is damaged ({reason_of(error)}) and cannot be replaced; delete it.") from error


def _key(tokenizer: RowTokenizer[Any, Any], settings: dict[str, Any]) -> str:
    """32 hex digits that change whenever the tokenized rows may change."""
    parts = {
        "format": FORMAT,
        "rows": tokenizer.table.fingerprint,
        "kind": tokenizer.kind.__qualname__,
        "tokenizer": _behaviour(tokenizer.chat),
        "max_prompt_tokens": tokenizer.max_prompt_tokens,
        "bad_rows": tokenizer.bad_rows,
        **settings,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _behaviour(chat: ChatTokenizer) -> list[Any]:
    """What tells tokenizers apart: vocabulary, template, stop ids, and what they make of a sample.

    The sample shows what those do not name: merges, added spaces, BOS, and a date that a template writes.
    """
    text = "Good day, naïve 世界 🌍!\n\n  def f(x):\treturn 1234567.89 # ok"
    sample = [chat.encode_prompt([{"role": "user", "content": text}]), chat.encode_response(text, 1000)]
    return [chat.fingerprint, chat.tokenizer.chat_template, list(chat.stop_ids), sample]


# Tokenizing.


def _tokenize(tokenizer: RowTokenizer[Any, RowT], workers: int | None, folder: Path) -> TokenizedRows[RowT] | None:
    """The rows if they are few, with their remarks logged; None if they were written to the folder."""
    counts, schema = Counts(), row_schema(tokenizer.kind)
    parts = _counted(tokenizer, workers, counts)
    few: list[pa.RecordBatch] = []
    size = 0
    for part in parts:
        few.append(part)
        size += part.nbytes
        if size > IN_MEMORY_BYTES:
            _write(chain(few, parts), schema, folder, lambda: tokenizer.remarks(counts))
            return None
    rows = TokenizedRows(InMemoryTable.from_batches(few, schema=schema), tokenizer.kind)
    if not rows:
        raise tokenizer.nothing_left(counts)
    for line in tokenizer.remarks(counts):
        warn(line)
    return rows


def _counted(tokenizer: RowTokenizer[Any, RowT], workers: int | None, counts: Counts) -> Iterator[pa.RecordBatch]:
    """The tokenized rows, chunk by chunk in their order, with a bar if it takes a while; adds to the counts."""
    bar = tqdm(
        desc=f"Tokenizing {tokenizer.table.name}",
        unit=" rows",
        delay=SECONDS_WITHOUT_BAR,
        file=sys.stdout,
        mininterval=0.1 if sys.stdout.isatty() else SECONDS_BETWEEN_LINES,
    )
    with bar:
        for part, of_part in _tokenized_chunks(tokenizer, workers):
            counts.add(of_part)
            bar.update(CHUNK_ROWS)
            yield part
    if tokenizer.table.changed:
        raise UserError(f"{tokenizer.table.name} changed while it was read; start again once nothing writes to it.")


def _tokenized_chunks(tokenizer: RowTokenizer[Any, RowT], workers: int | None) -> Iterator[TokenizedChunk]:
    rows = enumerate(tokenizer.table.rows)
    chunks: Iterator[Chunk] = iter(lambda: list(islice(rows, CHUNK_ROWS)), [])
    if workers is None:
        for chunk in islice(chunks, ROWS_ALONE // CHUNK_ROWS):
            yield _tokenize_chunk(tokenizer, chunk)
        workers = min(_processors(), MOST_WORKERS)
    if workers > 1 and (chunk := next(chunks, [])):
        yield from _in_processes(tokenizer, chain([chunk], chunks), workers)
    else:
        for chunk in chunks:
            yield _tokenize_chunk(tokenizer, chunk)


def _in_processes(
    tokenizer: RowTokenizer[Any, RowT], chunks: Iterable[Chunk], workers: int
) -> Iterator[TokenizedChunk]:
    """As `map` would, in other processes; reads only a few chunks ahead."""
    waiting: deque[Future[TokenizedChunk]] = deque()
    with _threads_of_tokenizers_off():
        pool = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(tokenizer,))
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_tokenize_in_worker, chunk))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "A process that tokenizes has died, as happens when memory runs out; lower data.tokenize_workers."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _threads_of_tokenizers_off() -> Iterator[None]:
    """The library's threads do not outlive a fork, of which it warns unless they are off."""
    before = os.environ.get(_TOKENIZER_THREADS)
    os.environ[_TOKENIZER_THREADS] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_TOKENIZER_THREADS]
        else:
            os.environ[_TOKENIZER_THREADS] = before


_of_worker: RowTokenizer[Any, Any] | None = None


def _start_worker(tokenizer: RowTokenizer[Any, Any]) -> None:
    global _of_worker
    _of_worker = tokenizer


def _tokenize_in_worker(chunk: Chunk) -> TokenizedChunk:
    assert _of_worker is not None
    return _tokenize_chunk(_of_worker, chunk)


def _tokenize_chunk(tokenizer: RowTokenizer[Any, Any], chunk: Chunk) -> TokenizedChunk:
    rows, counts = tokenizer.tokenize(chunk)
    return to_arrow(tokenizer.kind, rows), counts


# The file.


_DAMAGES = (OSError, ValueError, KeyError, TypeError, pa.ArrowException)
"""What files that were cut or overwritten raise when they are read."""


def _read(folder: Path, kind: type[RowT]) -> TokenizedRows[RowT]:
    """The rows that `_write` wrote, with their remarks logged."""
    about, path = json.loads((folder / ABOUT).read_text()), folder / ROWS
    if path.stat().st_size != about["bytes"]:
        raise ValueError(f"{ROWS} has {path.stat().st_size} bytes instead of {about['bytes']}")
    table = MemoryMappedTable.from_file(str(path))
    if table.schema != row_schema(kind):
        raise ValueError(f"{ROWS} has other columns")
    for line in about["remarks"]:
        warn(line)
    return TokenizedRows(table, kind)


def _write(parts: Iterable[pa.RecordBatch], schema: pa.Schema, folder: Path, remarks: Callable[[], list[str]]) -> None:
    """Writes a folder that appears whole or not at all; who is second leaves that of the first."""
    draft = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    try:
        draft.mkdir(parents=True)
        with (draft / ROWS).open("wb") as file:
            with pa.ipc.new_stream(file, schema) as writer:
                for part in parts:
                    writer.write_batch(part)
            os.fsync(file.fileno())  # else a machine that loses power may keep the name and lose the contents
        about = {"bytes": (draft / ROWS).stat().st_size, "remarks": remarks()}
        (draft / ABOUT).write_text(json.dumps(about))
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    except OSError as error:
        raise UserError(
            f"The tokenized rows cannot be written to {folder.parent} ({error}); set HF_DATASETS_CACHE to a folder "
            "that can be written to and has the space."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
