"""Rollouts with the transformers model that is trained, inside the training process."""

import torch
from torch import Tensor

from rto_lightning.backbone import Decoded, PolicyBackbone, ValueHead
from rto_lightning.rollout.sampling import SeededSampling
from rto_lightning.rollout.settings import RolloutSettings
from rto_lightning.rollout.trajectory import Trajectory


class TransformersEngine:
    """Samples a response to each prompt as one role of the backbone.

    Args:
        backbone: the model and its roles.
        settings: length, temperature and batch size.
    """

    def __init__(self, backbone: PolicyBackbone, settings: RolloutSettings) -> None:
        self.backbone = backbone
        self.settings = settings

    def rollout(
        self,
        role: str,
        input_ids: Tensor,
        attention_mask: Tensor,
        seeds: list[int],
        *,
        with_logprobs: bool = False,
        value_head: ValueHead | None = None,
    ) -> Trajectory:
        """Sample one response for each prompt.

        Prompts of like length are sampled together, and neighbours with the same prompt share its forward.

        Args:
            role: who speaks.
            input_ids: left-padded prompts, (B, P) int64.
            attention_mask: 1 on prompt tokens, (B, P).
            seeds: one for each prompt; the same seed and prompt give the same response in any batch, as far as the
                arithmetic of the model does.
            with_logprobs: also keep log-probabilities and entropies, at the temperature of the settings (1 if greedy).
            value_head: maps hidden states (N, H) of the role to values (N,), for a critic on the role's own trunk.

        Returns:
            The trajectory, with prompts as wide as they came and rows in the order in which they came.
        """
        settings, chat = self.settings, self.backbone.chat
        lengths = attention_mask.sum(-1)
        # The longest first: if memory is short, that shows at once. Stable, so that equal prompts stay neighbours.
        order = lengths.argsort(descending=True, stable=True)
        parts = []
        for rows in order.split(settings.batch_size or len(seeds)):
            columns = slice(input_ids.shape[1] - int(lengths[rows[0]]), None)
            draw = SeededSampling(
                [seeds[row] for row in rows.tolist()], settings.max_new_tokens, settings.temperature, with_logprobs
            )
            ids, mask = input_ids[rows, columns], attention_mask[rows, columns]
            limit, gather = settings.max_new_tokens, settings.gather_weights
            parts.append(self.backbone.decode(role, ids, mask, draw, limit, value_head, gather))
        decoded = _join(parts, order.argsort(), chat.pad_id)
        tokens = torch.cat([input_ids, decoded.tokens], dim=1)
        return Trajectory.from_tokens(tokens, attention_mask, chat.stop_ids, role, *decoded[1:])

    def close(self) -> None:
        """Nothing: the model belongs to the training process."""


def _join(parts: list[Decoded], order: Tensor, pad_id: int) -> Decoded:
    """Batches below each other, padded to the longest response, with their rows in this order."""
    width = max(part.tokens.shape[1] for part in parts)

    def join(tables: list[Tensor], value: int) -> Tensor:
        return torch.cat([torch.nn.functional.pad(t, (0, width - t.shape[1]), value=value) for t in tables])[order]

    tokens, *read = zip(*parts, strict=True)
    return Decoded(
        join(list(tokens), pad_id), *(None if tables[0] is None else join(list(tables), 0) for tables in read)
    )
