"""Answers of a policy to the same prompts at several times of its training, as the rows of a file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rto_lightning.inspection.responses import ComparedResponses, RewardedResponse

SAMPLES_FILE = "samples.jsonl"
"""Name of the file inside a stage's folder."""


@dataclass(frozen=True)
class Sample:
    """The answer to one prompt at one time."""

    iteration: int
    """Iterations of training before it; 0 is the policy as it began."""
    index: int
    """Which of the prompts, from 0."""
    rewarded: RewardedResponse
    """The response; its rewards are the token term of the reward that the policy is trained on."""
    kl: float
    """Sum over the response of log(policy / reference), nats."""
    total: float
    """Sum over the response of all terms of the reward."""
    truncated: bool
    """Whether the response reached the length limit."""

    def row(self) -> dict[str, Any]:
        """The fields as a row of a file."""
        figures = {name: getattr(self, name) for name in ("iteration", "index", "kl", "total", "truncated")}
        return {**figures, **self.rewarded.row()}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Sample":
        """The sample of a row.

        Raises:
            KeyError: if a column is missing.
        """
        figures = {name: row[name] for name in ("iteration", "index", "kl", "total", "truncated")}
        return cls(rewarded=RewardedResponse.from_row(row), **figures)


def read_samples(path: Path) -> list[Sample]:
    """The samples of a file, in its order; none if there is no such file.

    A last line that a process left half written when it was killed is not read.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return [Sample.from_row(json.loads(line)) for line in lines]


def first_and_last(samples: Sequence[Sample]) -> list[ComparedResponses]:
    """For each prompt the earliest answer beside the latest one, or that alone if they are of one time."""

    def prompt(sample: Sample) -> int:
        return sample.index

    compared = []
    for _, group in groupby(sorted(samples, key=prompt), key=prompt):
        by_time = {sample.iteration: sample.rewarded for sample in group}
        times = sorted({min(by_time), max(by_time)})
        compared.append(ComparedResponses({time_name(time): by_time[time] for time in times}))
    return compared


def time_name(iteration: int) -> str:
    """What stands over an answer of that time."""
    return f"After {iteration} iterations" if iteration > 1 else "After 1 iteration" if iteration else "Before training"
