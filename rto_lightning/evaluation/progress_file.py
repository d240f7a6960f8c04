"""Answers of a generation that has not ended, batch by batch, in a file beside the one they are for.

The first line says what is being generated; each further line holds one batch. A line that was being written when the
process died is left out, and its batch is generated again: as the same batch, so that the answers are the same.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rto_lightning.errors import UserError
from rto_lightning.evaluation.answer_rows import GeneratedAnswer
from rto_lightning.runs.files import check_room

SUFFIX = ".unfinished.jsonl"


class ProgressFile:
    """Takes batches of answers, and gives back those that are there.

    Args:
        target: the answer file that is to be written.
        settings: what the answers follow from.
        started: when the generation begins, in seconds since 1970; one that goes on keeps its time.

    Raises:
        UserError: if there are answers of other settings, or what is there is no such file.
    """

    def __init__(self, target: Path, settings: dict[str, Any], started: float) -> None:
        self.path = target.with_name(target.name + SUFFIX)
        self.started = started
        self.batches: list[list[GeneratedAnswer]] = []
        """In their order, from the first question on."""
        if self.path.exists():
            self._read(settings)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"settings": settings, "started": started})

    def add(self, answers: Sequence[GeneratedAnswer]) -> None:
        """Puts one more batch on the disk."""
        self._append([asdict(answer) for answer in answers])
        self.batches.append(list(answers))

    def remove(self) -> None:
        """Once the answer file is there."""
        self.path.unlink()

    def _read(self, settings: dict[str, Any]) -> None:
        lines = self.path.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        if not whole:  # not even the first line was written to its end
            self.path.unlink()
            self._append({"settings": settings, "started": self.started})
            return
        try:
            first, *batches = [json.loads(line) for line in whole]
            found, self.started = dict(first["settings"]), float(first["started"])
            self.batches = [[GeneratedAnswer(**answer) for answer in batch] for batch in batches]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self.path} is damaged; remove it, and the generation begins again.") from error
        other = sorted(name for name in {*found, *settings} if found.get(name) != settings.get(name))
        if other:
            raise UserError(
                f"{self.path} holds answers of an unfinished generation with another {' and '.join(other)}; "
                "generate with that one, or remove the file."
            )
        if len(whole) < len(lines):
            with self.path.open("r+b") as file:
                file.truncate(sum(map(len, whole)))

    def _append(self, content: Any) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(content, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            check_room(error, self.path)
            raise
