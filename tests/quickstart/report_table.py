"""Reads the table of policies in a report back, for tests to judge."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class TableRow:
    """A policy's line; (mean, standard error) of each quantity, None for an empty cell."""

    gold: tuple[float, float]
    gain: tuple[float, float] | None
    win_rate: float | None
    kl: tuple[float, float] | None
    length: tuple[float, float]


def read_table(report: str) -> dict[str, TableRow]:
    """The rows of the only table in a report, by the policies' names and in their order."""
    lines = [line for line in report.splitlines() if line.startswith("|")]
    header, rule, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert header[:4] == ["policy", "gold reward", "gain over SFT", "win rate against SFT"], header
    assert header[4:] == ["KL (nats)", "length (tokens)"], header
    assert all(re.fullmatch(":?-+:?", cell) for cell in rule), rule
    table = {}
    for name, gold, gain, win_rate, kl, length in rows:
        share = float(win_rate.removesuffix("%")) / 100 if win_rate else None
        table[name] = TableRow(_estimate(gold), _maybe(gain), share, _maybe(kl), _estimate(length))
    assert len(table) == len(rows)
    return table


def _estimate(cell: str) -> tuple[float, float]:
    mean, error = cell.split(" ± ")
    return float(mean), float(error)


def _maybe(cell: str) -> tuple[float, float] | None:
    return _estimate(cell) if cell else None
