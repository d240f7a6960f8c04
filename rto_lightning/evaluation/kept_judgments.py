"""Judgments that were paid for, on the disk as they come, so that no end of a process loses them."""

import hashlib
import json
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from rto_lightning.evaluation.answers import Comparison
from rto_lightning.evaluation.judging import Judgment
from rto_lightning.evaluation.progress_file import ProgressFile


class _Kept(NamedTuple):
    pair: str
    """Follows from everything that the judge is shown of a comparison."""
    games: tuple[float, ...]


class KeptJudgments:
    """What a judge has said, by comparison; several threads may add to it.

    A comparison that stayed unjudged is not kept, so that a later process asks about it again.

    Args:
        target: the file that is written when all judgments are in; they are kept beside it until then.
        settings: which judge, and how it is asked.

    Raises:
        UserError: if there are judgments of another judge, or what is there is no such file.
    """

    def __init__(self, target: Path, settings: dict[str, Any]) -> None:
        self._file = ProgressFile(target, settings, time.time(), _Kept._asdict, _read)
        self._games = dict(self._file.parts)
        self._lock = threading.Lock()
        self.path = self._file.path

    def get(self, comparison: Comparison) -> Judgment | None:
        """The judgment of a comparison, if there is one."""
        games = self._games.get(_pair(comparison))
        return None if games is None else Judgment(games)

    def add(self, comparison: Comparison, judgment: Judgment) -> None:
        """Puts a judgment on the disk."""
        if judgment.games:
            kept = _Kept(_pair(comparison), judgment.games)
            with self._lock:
                self._file.add(kept)
                self._games[kept.pair] = kept.games

    def remove(self) -> None:
        """Once all of them are in the target."""
        self._file.remove()


def _read(row: Any) -> _Kept:
    return _Kept(str(row["pair"]), tuple(float(game) for game in row["games"]))


def _pair(comparison: Comparison) -> str:
    shown = [comparison.id, comparison.prompt, comparison.baseline, comparison.answer]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()[:32]
