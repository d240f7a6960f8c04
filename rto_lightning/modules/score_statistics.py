"""Scores of answers of the reference policy, whose mean and standard deviation normalise a reward."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from rto_lightning.errors import UserError
from rto_lightning.modules.numerics import NumericsSettings

Batch = TypeVar("Batch")


def collect_scores(
    batches: Iterable[Batch], score: Callable[[Batch], Tensor], wanted: int, numerics: NumericsSettings
) -> Tensor:
    """Score batch after batch until there are enough finite scores.

    Args:
        batches: what is answered and scored.
        score: the scores of a batch over all ranks, (B,) or (B, S) of S sources.
        wanted: how many answers; fewer if the batches end.
        numerics: with action `skip`, an answer with a score that is not finite is left out.

    Returns:
        (N,) or (N, S) on the CPU.

    Raises:
        UserError: if a score is not finite, and the settings say stop or nothing is left.
    """
    kept: list[Tensor] = []
    left_out = total = 0
    for batch in batches:
        scores = score(batch).cpu()
        finite = scores.isfinite().view(len(scores), -1).all(1)
        kept.append(scores[finite])
        left_out, total = left_out + int((~finite).sum()), total + len(scores)
        if sum(map(len, kept)) >= wanted or (left_out and numerics.action == "stop"):
            break
    found = f"{left_out} of {total} answers of the reference policy have a score that is NaN or infinite"
    if left_out and (numerics.action == "stop" or left_out == total):
        raise UserError(
            f"{found}, so that scores cannot be normalised; check the reward, or set model.numerics.action to skip to "
            "measure on the others."
        )
    if left_out:
        rank_zero_warn(f"{found}; the statistics of the scores are those of the others.")
    return torch.cat(kept)[:wanted]
