"""Read a trajectory as one role after another, in batches of like length that fit memory."""

from collections.abc import Callable

import torch
from torch import Tensor

from rto_lightning.backbone import BackboneSettings, Message, PolicyBackbone, Sequences
from rto_lightning.modules.experience import PolicyReading
from rto_lightning.rewards import RewardSource, WeightedScores
from rto_lightning.rollout import Trajectory


class TrajectoryReader:
    """What the roles of a backbone say of a trajectory.

    Samples are read longest first, those of like length together, so that little padding is computed and a lack of
    memory shows at once. Results are in the order of the trajectory.

    Args:
        backbone: the model and its roles.
        batch_size: samples for each forward.
    """

    def __init__(self, backbone: PolicyBackbone, batch_size: int) -> None:
        self.backbone = backbone
        self.batch_size = batch_size

    def policy(
        self, role: str, trajectory: Trajectory, temperature: float, value_role: str | None = None
    ) -> PolicyReading:
        """What the policy says of its responses: as kept by the rollout, or by a forward over them.

        Args:
            role: whose responses they are.
            trajectory: B prompts with a response each.
            temperature: at which they were sampled.
            value_role: a role whose value head sits on the hidden states of `role`; None reads no values.
        """
        logprobs, entropies, values = trajectory.logprobs, trajectory.entropies, trajectory.values
        has_values = value_role is None or values is not None
        if trajectory.role == role and logprobs is not None and entropies is not None and has_values:
            return PolicyReading(logprobs, entropies, values)
        if value_role is not None:
            return PolicyReading(*self.logprobs_entropy_and_values(role, value_role, trajectory, temperature))
        return PolicyReading(*self.logprobs_and_entropy(role, trajectory, temperature))

    def logprobs(self, role: str, trajectory: Trajectory, temperature: float = 1.0) -> Tensor:
        """Log-probability of each response token, (B, T), nats."""
        read = self.backbone.token_logprobs
        return self._read(trajectory, lambda rows: (read(role, rows, temperature)[0],))[0]

    def logprobs_and_entropy(self, role: str, trajectory: Trajectory, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probability of each response token and entropy before it, both (B, T), nats."""

        def read(rows: Sequences) -> tuple[Tensor, ...]:
            logprobs, entropy = self.backbone.token_logprobs(role, rows, temperature, with_entropy=True)
            assert entropy is not None
            return logprobs, entropy

        logprobs, entropy = self._read(trajectory, read)
        return logprobs, entropy

    def logprobs_entropy_and_values(
        self, role: str, value_role: str, trajectory: Trajectory, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`logprobs_and_entropy`, and what the head of `value_role` reads off the same forward, (B, T)."""

        def read(rows: Sequences) -> tuple[Tensor, ...]:
            logprobs, entropy, values = self.backbone.token_logprobs_and_values(
                role, value_role, rows, temperature, with_entropy=True
            )
            assert entropy is not None
            return logprobs, entropy, values

        logprobs, entropy, values = self._read(trajectory, read)
        return logprobs, entropy, values

    def values(self, role: str, trajectory: Trajectory) -> Tensor:
        """Value before each response token, (B, T)."""
        return self._read(trajectory, lambda rows: (self.backbone.token_values(role, rows),))[0]

    def scores(self, scores: WeightedScores, trajectory: Trajectory, prompts: list[list[Message]]) -> Tensor:
        """What each of S sources says of each response, (B, S), in the units of the source."""
        return torch.stack([self._score(source, trajectory, prompts) for source in scores.sources], dim=1)

    def _score(self, source: RewardSource, trajectory: Trajectory, prompts: list[list[Message]]) -> Tensor:
        if source.takes_all:
            return source.score(prompts, trajectory)
        batches = by_length(trajectory.sequences).split(self.batch_size)
        parts = [source.score([prompts[row] for row in rows.tolist()], trajectory.rows(rows)) for rows in batches]
        return _in_order(parts, batches)

    def _read(self, trajectory: Trajectory, read: Callable[[Sequences], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        batches = by_length(trajectory.sequences).split(self.batch_size)
        parts = [read(trajectory.sequences.rows(rows)) for rows in batches]
        return tuple(_in_order(tensors, batches) for tensors in zip(*parts, strict=True))


def reads_while_sampling(sampling_logprobs: bool | None, backbone: BackboneSettings, precision: str) -> bool:
    """Whether the sampling forwards stand for the policy's own reading of its responses.

    Args:
        sampling_logprobs: the setting `ppo.sampling_logprobs`; None is where that is exact but for rounding, about
            1e-6. Rounded to 16 bits the two differ by about 0.04 nats a token, since they add in another order;
            rounded to the 10 bits of TF32 (`torch.set_float32_matmul_precision`) they may differ as much.
        backbone: says in what the frozen weights are held.
        precision: the trainer's.
    """
    if sampling_logprobs is not None:
        return sampling_logprobs
    if backbone.quantization is not None or precision not in ("32-true", "64-true"):
        return False
    whole_products = torch.get_float32_matmul_precision() == "highest"
    return backbone.frozen_dtype == torch.float64 or (backbone.frozen_dtype == torch.float32 and whole_products)


def by_length(sequences: Sequences, rows: Tensor | None = None) -> Tensor:
    """The given rows, or all, longest prompt and response first, (N,) int64; those of one length keep their order."""
    lengths = sequences.attention_mask.sum(dim=1)
    if rows is None:
        return lengths.argsort(descending=True, stable=True)
    return rows[lengths[rows].argsort(descending=True, stable=True)]


def _in_order(parts: list[Tensor] | tuple[Tensor, ...], batches: tuple[Tensor, ...]) -> Tensor:
    """What was read batch by batch, each row where it belongs."""
    joined, rows = torch.cat(list(parts)), torch.cat(batches)
    return torch.empty_like(joined).index_copy(0, rows, joined)
