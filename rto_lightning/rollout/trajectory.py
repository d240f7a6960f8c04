"""What a rollout returns."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rto_lightning.algorithms import response_mask_from_lengths
from rto_lightning.backbone import ChatTokenizer, Sequences


@dataclass(frozen=True)
class Trajectory:
    """Prompts with a sampled response each. No sampled token is ever rewritten."""

    sequences: Sequences
    """Left-padded prompts and right-padded responses; the response mask covers the stop id if one was sampled."""
    truncated: Tensor
    """Responses that reached the length limit without a stop id, (B,) bool."""
    role: str | None = None
    """Who sampled the responses; None if unknown."""
    logprobs: Tensor | None = None
    """Log-probability of each response token under `role` in nats, (B, T) float32 (float64 if the logits are), 0
    outside the response; None if not asked for. At the sampling temperature, and from the forward that sampled it: in
    bfloat16 it differs from that of a pass over the whole response by about 0.04 nats a token."""
    entropies: Tensor | None = None
    """Entropy of the distribution before each response token; as `logprobs` in every other way."""
    values: Tensor | None = None
    """Value before each response token, (B, T) float32 or float64, 0 outside the response: a value head on the hidden
    state that predicts the token, from the forward that sampled it; None if no head was given."""
    engine_logprobs: Tensor | None = None
    """As `logprobs`, but of an engine with weights and arithmetic of its own, (B, T) float32; None where the model that
    is trained has sampled. They measure, and can weigh, the mismatch; nothing else reads them."""

    def rows(self, index: Tensor | slice) -> "Trajectory":
        """The samples that `index` selects, at the same widths."""
        tables = (self.logprobs, self.entropies, self.values, self.engine_logprobs)
        picked = (None if table is None else table[index] for table in tables)
        return Trajectory(self.sequences.rows(index), self.truncated[index], self.role, *picked)

    @classmethod
    def from_tokens(
        cls,
        tokens: Tensor,
        prompt_attention_mask: Tensor,
        stop_ids: tuple[int, ...],
        role: str | None = None,
        logprobs: Tensor | None = None,
        entropies: Tensor | None = None,
        values: Tensor | None = None,
        engine_logprobs: Tensor | None = None,
    ) -> "Trajectory":
        """Build it from what an engine sampled.

        A response ends with the first stop id; what stands after it is padding. Lengths come from there, never from
        comparing with the padding id, which often is a stop id itself.

        Args:
            tokens: prompts and responses, (B, P+T) int64.
            prompt_attention_mask: 1 on prompt tokens, (B, P).
            stop_ids: ids that end a response.
            role: who sampled them.
            logprobs: log-probability of each response token, (B, T).
            entropies: entropy before each response token, (B, T).
            values: value before each response token, (B, T).
            engine_logprobs: log-probability of each response token as another engine has it, (B, T).
        """
        prompt_width = prompt_attention_mask.shape[1]
        responses = tokens[:, prompt_width:]
        is_stop = torch.isin(responses, torch.tensor(stop_ids, device=tokens.device))
        stopped = is_stop.any(-1)
        first_stop = is_stop.int().argmax(-1)
        lengths = torch.where(stopped, first_stop + 1, responses.shape[1])
        width = int(lengths.max())
        response_mask = response_mask_from_lengths(lengths, width)
        attention_mask = torch.cat([prompt_attention_mask, response_mask.to(prompt_attention_mask.dtype)], dim=1)
        sequences = Sequences(tokens[:, : prompt_width + width], attention_mask, response_mask)
        read = (
            None if table is None else table[:, :width].masked_fill(~response_mask, 0.0)
            for table in (logprobs, entropies, values, engine_logprobs)
        )
        return cls(sequences, ~stopped, role, *read)


def response_texts(trajectory: Trajectory, chat: ChatTokenizer) -> list[str]:
    """The text of each response, without its stop id."""
    ids, masks = trajectory.sequences.response_ids, trajectory.sequences.response_mask
    return [chat.decode_response(row[mask].tolist()) for row, mask in zip(ids, masks, strict=True)]
