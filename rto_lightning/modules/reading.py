"""Read a trajectory as one role after another, in batches that fit memory."""

from collections.abc import Iterator

import torch
from torch import Tensor

from rto_lightning.backbone import Message, PolicyBackbone
from rto_lightning.rewards import WeightedScores
from rto_lightning.rollout import Trajectory


class TrajectoryReader:
    """What the roles of a backbone say of a trajectory.

    Args:
        backbone: the model and its roles.
        batch_size: samples for each forward.
    """

    def __init__(self, backbone: PolicyBackbone, batch_size: int) -> None:
        self.backbone = backbone
        self.batch_size = batch_size

    def logprobs(self, role: str, trajectory: Trajectory, temperature: float = 1.0) -> Tensor:
        """Log-probability of each response token, (B, T), nats."""
        parts = [
            self.backbone.token_logprobs(role, trajectory.rows(rows).sequences, temperature)[0]
            for rows in self._batches(trajectory)
        ]
        return torch.cat(parts)

    def logprobs_and_entropy(self, role: str, trajectory: Trajectory, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probability of each response token and entropy before it, both (B, T), nats."""
        logprobs, entropies = [], []
        for rows in self._batches(trajectory):
            sequences = trajectory.rows(rows).sequences
            part, entropy = self.backbone.token_logprobs(role, sequences, temperature, with_entropy=True)
            assert entropy is not None
            logprobs.append(part)
            entropies.append(entropy)
        return torch.cat(logprobs), torch.cat(entropies)

    def values(self, role: str, trajectory: Trajectory) -> Tensor:
        """Value before each response token, (B, T)."""
        parts = [
            self.backbone.token_values(role, trajectory.rows(rows).sequences) for rows in self._batches(trajectory)
        ]
        return torch.cat(parts)

    def scores(self, scores: WeightedScores, trajectory: Trajectory, prompts: list[list[Message]]) -> Tensor:
        """What each of S sources says of each response, (B, S), in the units of the source."""
        parts = [scores.score(prompts[rows], trajectory.rows(rows)) for rows in self._batches(trajectory)]
        return torch.cat(parts)

    def _batches(self, trajectory: Trajectory) -> Iterator[slice]:
        for start in range(0, len(trajectory.truncated), self.batch_size):
            yield slice(start, start + self.batch_size)
