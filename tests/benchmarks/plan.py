"""Cells, the stages they belong to, and the choices between stages: functions of the protocol and of what is done."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.benchmarks.protocol import BASELINE, GoldName, Method, Protocol, Settings

Records = Mapping[str, Mapping[str, Any]]
"""Finished cells by their names."""


@dataclass(frozen=True)
class Cell:
    """One training run and its measurement."""

    gold: GoldName
    seed: int
    method: str
    settings: Settings = field(hash=False)
    iterations: int
    """0 for direct preference learning."""

    @property
    def online(self) -> bool:
        """Whether it learns from its own responses."""
        return self.iterations > 0

    @property
    def name(self) -> str:
        """Tells cells apart: other settings, another name."""
        text = json.dumps([self.settings, self.iterations], sort_keys=True)
        digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
        return f"{self.gold}/{self.method}/seed{self.seed}-{digest}"


@dataclass(frozen=True)
class Stage:
    """One stage of the protocol for one gold reward."""

    letter: str
    gold: GoldName
    size: int
    """Number of its cells; those it shares with an earlier stage count."""
    cells: tuple[Cell, ...]
    """Those that are known: a choice that is not made yet hides the rest."""


def stages(protocol: Protocol, records: Records) -> Iterator[Stage]:
    """The stages in the order in which they are run."""
    tuning, fresh = protocol.tuning_seeds, protocol.fresh_seeds
    for gold in protocol.golds:
        first = [cell for row in protocol.shared for cell in shared_cells(protocol, gold, row)]
        yield Stage("A", gold, len(first), tuple(sorted(first, key=lambda cell: cell.seed)))

        shared = choose_shared(protocol, gold, records)
        size = len(tuning) * sum(len(method.tried) for method in protocol.methods)
        second = [
            cell
            for method in protocol.methods
            for row in method.tried
            if shared is not None
            for cell in configuration_cells(protocol, gold, method, shared, row)
        ]
        yield Stage("B", gold, size, tuple(second))

        third = [
            cell
            for method in protocol.methods
            if (settings := choose_configuration(protocol, gold, method, records)) is not None
            for cell in chosen_cells(protocol, gold, method, settings)
        ]
        direct = [cell for method in protocol.preference_methods for cell in preference_cells(protocol, gold, method)]
        size = len(fresh) * (len(protocol.methods) + len(protocol.preference_methods))
        yield Stage("C", gold, size, (*third, *direct))
        if gold == "sum":
            sweep = tuple(cell for row in sweep_cells(protocol, records) for cell in row)
            yield Stage("D", gold, len(tuning) * len(protocol.sweep), sweep)


def sweep_cells(protocol: Protocol, records: Records) -> list[list[Cell]]:
    """The cells of each configuration of stage D; none while the shared settings are not chosen."""
    shared = choose_shared(protocol, "sum", records) if "sum" in protocol.golds else None
    if shared is None:
        return []
    rto = next(method for method in protocol.methods if method.name == "rto")
    return [configuration_cells(protocol, "sum", rto, shared, row) for row in protocol.sweep]


def choose_shared(protocol: Protocol, gold: GoldName, records: Records) -> Settings | None:
    """Learning rate and KL coefficient with which PPO does best; None while a cell of stage A is missing."""
    return _best(protocol.shared, [shared_cells(protocol, gold, row) for row in protocol.shared], records)


def choose_configuration(protocol: Protocol, gold: GoldName, method: Method, records: Records) -> Settings | None:
    """All settings of the method's best configuration; None while a cell of stage B is missing."""
    shared = choose_shared(protocol, gold, records)
    if shared is None:
        return None
    candidates = [configuration_cells(protocol, gold, method, shared, row) for row in method.tried]
    choices = [cells[0].settings for cells in candidates]
    if method.nearest_kl_of is None:
        return _best(choices, candidates, records)
    baseline = next(method for method in protocol.methods if method.name == BASELINE)
    chosen = choose_configuration(protocol, gold, baseline, records)
    if chosen is None or any(cell.name not in records for row in candidates for cell in row):
        return None
    level = _mean_kl(
        [Cell(gold, seed, BASELINE, chosen, protocol.iterations) for seed in protocol.tuning_seeds], records
    )
    distances = [abs(_mean_kl(cells, records) - level) for cells in candidates]
    nearest = min(range(len(distances)), key=distances.__getitem__)
    return choices[nearest] if math.isfinite(distances[nearest]) else None


def _mean_kl(cells: Sequence[Cell], records: Records) -> float:
    """KL on validation prompts, mean over the cells; infinite if one of them failed or diverged."""
    done = [records[cell.name] for cell in cells]
    if any(selection_score(record) == -math.inf for record in done):
        return math.inf
    return sum(float(record["validation"]["kl"]) for record in done) / len(done)


def selection_score(record: Mapping[str, Any]) -> float:
    """Gold reward on validation prompts; a run that failed or diverged is worse than any other."""
    if record.get("error") is not None or record["diverged"]:
        return -math.inf
    return float(record["validation"]["gold"])


def _best(choices: Sequence[Settings], cells: Sequence[Sequence[Cell]], records: Records) -> Settings | None:
    """The choice with the highest mean score over its cells, the first of equal ones."""
    if any(cell.name not in records for row in cells for cell in row):
        return None
    scores = [sum(selection_score(records[cell.name]) for cell in row) / len(row) for row in cells]
    best = max(range(len(scores)), key=scores.__getitem__)
    return choices[best] if math.isfinite(scores[best]) else None


def shared_cells(protocol: Protocol, gold: GoldName, shared: Settings) -> list[Cell]:
    """The cells of one setting of stage A."""
    ppo = next(method for method in protocol.methods if method.name == BASELINE)
    return configuration_cells(protocol, gold, ppo, shared, ppo.tried[0])


def configuration_cells(
    protocol: Protocol, gold: GoldName, method: Method, shared: Settings, row: Settings
) -> list[Cell]:
    """The cells of one configuration, one for each tuning seed."""
    settings = {**method.fixed, **shared, **row}
    return [Cell(gold, seed, method.runs_of, settings, protocol.iterations) for seed in protocol.tuning_seeds]


def chosen_cells(protocol: Protocol, gold: GoldName, method: Method, settings: Settings) -> list[Cell]:
    """The cells of stage C of a method that learns online."""
    return [Cell(gold, seed, method.runs_of, settings, protocol.iterations) for seed in protocol.fresh_seeds]


def preference_cells(protocol: Protocol, gold: GoldName, method: Method) -> list[Cell]:
    """The cells of stage C of a method that learns from preferences directly; it has no iterations."""
    return [Cell(gold, seed, method.name, method.fixed, 0) for seed in protocol.fresh_seeds]
