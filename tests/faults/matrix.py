"""Counts the faults that the tests of this folder try and the ones that are survived, by area."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class FaultMatrix:
    """Faults by area: how many were tried, how many survived."""

    def __init__(self) -> None:
        self.tried_in: Counter[str] = Counter()
        self.survived_in: Counter[str] = Counter()
        self.failed: list[str] = []

    @contextmanager
    def tried(self, area: str, fault: str) -> Iterator[None]:
        """Count a fault as tried and, if the block ends without an exception, as survived.

        Args:
            area: row of the table.
            fault: what it is, for the list of those that were not survived.
        """
        self.tried_in[area] += 1
        try:
            yield
        except BaseException:
            self.failed.append(f"{area}: {fault}")
            raise
        self.survived_in[area] += 1

    def counts(self) -> dict[str, Any]:
        """What another process can :meth:`add` to its own."""
        return {"tried": dict(self.tried_in), "survived": dict(self.survived_in), "failed": self.failed}

    def add(self, counts: Mapping[str, Any]) -> None:
        """Take what another process has counted; nothing if there is nothing."""
        self.tried_in.update(counts.get("tried", {}))
        self.survived_in.update(counts.get("survived", {}))
        self.failed += counts.get("failed", [])

    def table(self) -> list[str]:
        """The lines of the table, and one for each fault that was not survived; nothing if none was tried."""
        if not self.tried_in:
            return []
        rows = [(area, self.tried_in[area], self.survived_in[area]) for area in sorted(self.tried_in)]
        rows.append(("all", self.tried_in.total(), self.survived_in.total()))
        width = max(len(area) for area, _, _ in rows)
        lines = [f"{'area':<{width}}  tried  survived"]
        lines += [f"{area:<{width}}  {tried:5d}  {survived:8d}" for area, tried, survived in rows]
        return lines + [f"not survived: {fault}" for fault in self.failed]


MATRIX = FaultMatrix()
"""Of this process."""
