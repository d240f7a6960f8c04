"""Log-probabilities of a preference set under a role that does not change, looked up by the row of a pair."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rto_lightning.backbone import PolicyBackbone
from rto_lightning.backbone.logprob_cache import ResponseLogprobs, cached_logprobs
from rto_lightning.data import PreferenceBatch
from rto_lightning.data.preferences import PreferenceRow


@dataclass(frozen=True)
class PairLogprobs:
    """The log-probability of each token of both answers of N pairs under one role."""

    answers: ResponseLogprobs
    """2N responses: the chosen answers, then the rejected ones in the same order. On the CPU."""
    positions: dict[int, int]
    """For the row of a pair in the data set (`PreferenceBatch.index`) its position, from 0 to N - 1."""

    def __len__(self) -> int:
        return len(self.positions)

    def pair(self, index: int) -> tuple[Tensor, Tensor]:
        """Those of the chosen and of the rejected answer to one row of the data set, (length,) each, in nats."""
        position = self.positions[index]
        return self.answers.response(position), self.answers.response(position + len(self))

    def of(self, batch: PreferenceBatch) -> Tensor:
        """Those of a batch of B pairs: (2B, T) nats on the batch's device, 0 outside the response.

        Raises:
            ValueError: if the batch is not made of these pairs.
        """
        mask = batch.sequences.response_mask
        try:
            chosen = torch.tensor([self.positions[index] for index in batch.index.tolist()])
        except KeyError as error:
            raise ValueError(f"row {error} of the batch is not among the pairs of these log-probabilities") from error
        logprobs, valid = self.answers.padded(torch.cat([chosen, chosen + len(self)]))
        if not torch.equal(valid, mask.cpu()):
            raise ValueError("the answers of the batch differ in length from those of these log-probabilities")
        return logprobs.to(mask.device)


def cached_pair_logprobs(
    backbone: PolicyBackbone,
    role: str,
    rows: Sequence[PreferenceRow],
    folder: Path | str,
    batch_size: int = 8,
    progress: bool = True,
    weights: str | None = None,
) -> PairLogprobs:
    """Log-probabilities of pairs under a role at temperature 1, from a folder or else computed and written to it.

    Args:
        backbone: the model and its roles.
        role: whose log-probabilities: `reference`, `dpo`, or any other that is not being trained.
        rows: N tokenized pairs, such as `PreferenceDataModule.rows["train"]`.
        folder: where the files are; see :func:`cached_logprobs`.
        batch_size: pairs in one forward; changes results by rounding only.
        progress: show a bar while they are computed.
        weights: what :func:`weights_hash` returned for the role, if it is known already.

    Raises:
        UserError: if they must be computed and the folder cannot be written to.
        ValueError: if two rows have the same index.
    """
    positions = {row.index: position for position, row in enumerate(rows)}
    if len(positions) < len(rows):
        raise ValueError("two pairs have the same index, so their log-probabilities cannot be told apart")
    prompts = [row.prompt for row in rows] * 2
    responses = [row.chosen for row in rows] + [row.rejected for row in rows]
    answers = cached_logprobs(backbone, role, prompts, responses, folder, 2 * batch_size, progress, weights)
    return PairLogprobs(answers, positions)
