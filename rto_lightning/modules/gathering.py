"""The samples of all ranks as one table on every rank, so that an iteration is the same on any number of them."""

from dataclasses import fields, replace
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from rto_lightning.backbone import Sequences
from rto_lightning.modules.experience import RewardedTrajectory
from rto_lightning.parallel import gather_rows, largest, rank, ranks
from rto_lightning.rollout import Trajectory


def gather_rewarded(rewarded: RewardedTrajectory, values: Tensor | None) -> tuple[RewardedTrajectory, Tensor | None]:
    """Rewarded trajectories and values of the critic of all ranks, in the order of ranks.

    Args:
        rewarded: B samples, as many on every rank.
        values: (B, T), or None on every rank.

    Returns:
        W * B samples with W ranks; with one, what was given.
    """
    if ranks() == 1:
        return rewarded, values
    sequences = rewarded.trajectory.sequences
    prompt_width, width = largest(sequences.prompt_width, sequences.response_width)

    def tokens(table: Tensor) -> Tensor:
        """Of one number for each response token."""
        return gather_rows(pad(table, (0, width - table.shape[1])))

    def both(table: Tensor) -> Tensor:
        """Of one number for each token of prompt and response."""
        outside = prompt_width - sequences.prompt_width, width - sequences.response_width
        return gather_rows(pad(table, outside))

    everyone = Sequences(both(sequences.input_ids), both(sequences.attention_mask), tokens(sequences.response_mask))
    trajectory = rewarded.trajectory
    names = [f.name for f in fields(Trajectory) if f.name not in _NOT_TABLES]
    known = [name for name in names if getattr(trajectory, name) is not None]
    tables: dict[str, Any] = {name: tokens(getattr(trajectory, name)) for name in known}
    trajectory = replace(trajectory, sequences=everyone, truncated=gather_rows(trajectory.truncated), **tables)
    terms = replace(rewarded.terms, **{f.name: tokens(getattr(rewarded.terms, f.name)) for f in fields(rewarded.terms)})
    gathered = replace(
        rewarded,
        trajectory=trajectory,
        logprobs=tokens(rewarded.logprobs),
        entropy=tokens(rewarded.entropy),
        kl=tokens(rewarded.kl),
        scores=None if rewarded.scores is None else gather_rows(rewarded.scores),
        terms=terms,
    )
    return gathered, None if values is None else tokens(values)


_NOT_TABLES = ("sequences", "truncated", "role")
"""Fields of a trajectory that are not (B, T)."""


def own_rows(rows: Tensor) -> Tensor:
    """The samples of a minibatch that this rank trains on, of like length on all ranks if `rows` is sorted by it.

    Args:
        rows: all samples of the minibatch, (M,) int64 with M a multiple of the number of ranks.
    """
    return rows[rank() :: ranks()]
