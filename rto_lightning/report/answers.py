"""The answers that RTO stages gave to the same prompts, side by side."""

import json
from collections.abc import Mapping
from pathlib import Path

from rto_lightning.inspection.responses import ComparedResponses, RewardedResponse
from rto_lightning.inspection.samples import SAMPLES_FILE, read_samples, time_name


def before_and_after(folders: Mapping[str, Path], most: int = 8) -> list[ComparedResponses]:
    """For each prompt the answer before training and that of each stage at its end.

    Stages that began as the same policy share the first answer, read with the rewards of the one that has any.

    Args:
        folders: of stages, by their names; those without samples are left out.
        most: prompts.
    """
    found: dict[str, dict[str, RewardedResponse]] = {}
    for name, folder in folders.items():
        samples = read_samples(folder / SAMPLES_FILE)
        last = max((sample.iteration for sample in samples), default=0)
        for sample in samples:
            answers = found.setdefault(json.dumps(sample.rewarded.prompt), {})
            if sample.iteration == 0:
                _add_first(answers, name, sample.rewarded)
            elif sample.iteration == last:
                answers[f"{name}, {time_name(last).lower()}"] = sample.rewarded
    return [ComparedResponses(answers) for answers in list(found.values())[:most]]


def _add_first(answers: dict[str, RewardedResponse], name: str, first: RewardedResponse) -> None:
    """Put an answer from before training in its place, unless it is there already."""
    title = time_name(0)
    known = answers.get(title)
    if known is None or (known.token_ids == first.token_ids and not any(known.rewards)):
        answers[title] = first
    elif known.token_ids != first.token_ids:
        answers[f"{name}, {title.lower()}"] = first
