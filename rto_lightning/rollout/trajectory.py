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

    def rows(self, index: Tensor | slice) -> "Trajectory":
        """The samples that `index` selects, at the same widths."""
        return Trajectory(self.sequences.rows(index), self.truncated[index])

    @classmethod
    def from_tokens(cls, tokens: Tensor, prompt_attention_mask: Tensor, stop_ids: tuple[int, ...]) -> "Trajectory":
        """Build it from what an engine sampled.

        A response ends with the first stop id; what stands after it is padding. Lengths come from there, never from
        comparing with the padding id, which often is a stop id itself.

        Args:
            tokens: prompts and responses, (B, P+T) int64.
            prompt_attention_mask: 1 on prompt tokens, (B, P).
            stop_ids: ids that end a response.
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
        return cls(sequences, ~stopped)

    @classmethod
    def concatenate(cls, parts: list["Trajectory"], pad_id: int) -> "Trajectory":
        """Join trajectories whose prompts have the same width; responses are padded to the longest."""
        width = max(part.sequences.response_width for part in parts)

        def widen(tensor: Tensor, missing: int, value: int) -> Tensor:
            return torch.nn.functional.pad(tensor, (0, missing), value=value)

        missing = [width - part.sequences.response_width for part in parts]
        sequences = Sequences(
            torch.cat([widen(p.sequences.input_ids, m, pad_id) for p, m in zip(parts, missing, strict=True)]),
            torch.cat([widen(p.sequences.attention_mask, m, 0) for p, m in zip(parts, missing, strict=True)]),
            torch.cat([widen(p.sequences.response_mask, m, 0) for p, m in zip(parts, missing, strict=True)]),
        )
        return cls(sequences, torch.cat([part.truncated for part in parts]))


def response_texts(trajectory: Trajectory, chat: ChatTokenizer) -> list[str]:
    """The text of each response, without its stop id."""
    ids, masks = trajectory.sequences.response_ids, trajectory.sequences.response_mask
    return [chat.decode_response(row[mask].tolist()) for row, mask in zip(ids, masks, strict=True)]
