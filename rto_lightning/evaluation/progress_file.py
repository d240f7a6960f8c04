"""What a command that has not ended has made so far, part by part, in a file beside the one that it is for.

The first line says what it follows from; each further line holds one part. A line that was being written when the
process died is left out, and its part is made again.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from rto_lightning.errors import UserError
from rto_lightning.runs.files import check_room

SUFFIX = ".unfinished.jsonl"

Part = TypeVar("Part")


class ProgressFile(Generic[Part]):
    """Takes parts, and gives back those that are there.

    Args:
        target: the file that is to be written in the end.
        settings: what the parts follow from.
        started: when the work begins, in seconds since 1970; work that goes on keeps its time.
        write: a part as JSON holds it.
        read: the part again.

    Raises:
        UserError: if there are parts of other settings, or what is there is no such file.
    """

    def __init__(
        self,
        target: Path,
        settings: dict[str, Any],
        started: float,
        write: Callable[[Part], Any],
        read: Callable[[Any], Part],
    ) -> None:
        self.path = target.with_name(target.name + SUFFIX)
        self.started = started
        self.parts: list[Part] = []
        """In the order in which they were added."""
        self._write, self._read = write, read
        self._settings = settings
        if self.path.exists():
            self._go_on()

    def add(self, part: Part) -> None:
        """Puts one more part on the disk."""
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"settings": self._settings, "started": self.started})
        self._append(self._write(part))
        self.parts.append(part)

    def remove(self) -> None:
        """Once the target is there."""
        self.path.unlink(missing_ok=True)

    def _go_on(self) -> None:
        lines = self.path.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        if len(whole) < 2:  # nothing was made
            self.path.unlink()
            return
        try:
            first, *parts = [json.loads(line) for line in whole]
            found, self.started = dict(first["settings"]), float(first["started"])
            self.parts = [self._read(part) for part in parts]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self.path} is damaged; remove it, and the command begins again.") from error
        names = sorted({*found, *self._settings})
        other = [name for name in names if found.get(name) != self._settings.get(name)]
        if other:
            raise UserError(
                f"{self.path} is of a command that has not ended and had another {' and '.join(other)}; give the same "
                "to go on, or remove the file."
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
