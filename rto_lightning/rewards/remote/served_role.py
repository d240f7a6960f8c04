"""A reward role behind a service: requests to tokens to scores."""

import sys
from typing import Any

import torch

from rto_lightning.backbone import Message, PolicyBackbone, Sequences
from rto_lightning.errors import UserError
from rto_lightning.rewards.remote.protocol import BadRequest, ScoreRequest


class ServedRole:
    """Scores as :class:`RoleReward` gives them, in batches of like length.

    Args:
        backbone: the backbone that has the role.
        role: its name there.
        batch_size: responses for each forward.
    """

    def __init__(self, backbone: PolicyBackbone, role: str, batch_size: int) -> None:
        self.backbone, self.role, self.batch_size = backbone, role, batch_size
        model: Any = backbone.model_of(role)
        self.context_length = backbone.context_length(role)
        self.vocabulary_size: int = model.get_input_embeddings().weight.shape[0]
        self.device: torch.device = model.device

    @torch.no_grad()
    def __call__(self, request: ScoreRequest) -> list[float]:
        """The score of each response, in the units of the role.

        Raises:
            BadRequest: if a text cannot be encoded, or is longer than the model's context.
        """
        rows = self.encode(request)
        for number, row in enumerate(rows):
            if not 0 < len(row) <= self.context_length:
                raise BadRequest(
                    f"response {number} and its prompt have {len(row)} tokens; the model takes 1 to "
                    f"{self.context_length}"
                )
        by_length = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
        scores = [0.0] * len(rows)
        for start in range(0, len(rows), self.batch_size):
            batch = by_length[start : start + self.batch_size]
            # The score is read off the last token, so where the prompt ends makes no difference.
            joined = Sequences.from_lists([[] for _ in batch], [rows[n] for n in batch], self.backbone.chat.pad_id)
            of_batch = self.backbone.sequence_scores(self.role, joined.to(self.device)).float().tolist()
            for number, score in zip(batch, of_batch, strict=True):
                scores[number] = score
        return scores

    def encode(self, request: ScoreRequest) -> list[list[int]]:
        """The tokens of each prompt with its response.

        The client's own, if it has the same vocabulary; else messages and responses as RTO encodes them; else `query`,
        in which special tokens are recognised, as OpenRLHF's service does it.

        Raises:
            BadRequest: if the request has nothing that can be encoded.
        """
        chat = self.backbone.chat
        if (
            request.vocabulary == chat.fingerprint
            and request.prompt_ids is not None
            and request.response_ids is not None
        ):
            rows = [prompt + answer for prompt, answer in zip(request.prompt_ids, request.response_ids, strict=True)]
            if any(token >= self.vocabulary_size for row in rows for token in row):
                raise BadRequest("there are ids that the vocabulary does not have")
            return rows
        if request.messages is not None and request.responses is not None:
            return self._encode_messages(request.messages, request.responses, request.truncated)
        if not request.query:
            return []
        stops = tuple(chat.tokenizer.convert_ids_to_tokens(list(chat.stop_ids)))
        ids: list[list[int]] = chat.tokenizer(
            # What templates write after the stop is no part of an answer.
            [text.rstrip() if text.rstrip().endswith(stops) else text for text in request.query],
            add_special_tokens=False,
        )["input_ids"]
        return ids

    def _encode_messages(
        self, messages: list[list[Message]], responses: list[str], truncated: list[bool] | None
    ) -> list[list[int]]:
        chat = self.backbone.chat
        try:
            prompts = chat.encode_prompts(messages)
        except UserError as error:
            raise BadRequest(str(error)) from error
        answers = chat.encode_responses(responses, sys.maxsize)
        return [
            prompt + (answer[:-1] if is_truncated else answer)
            for prompt, answer, is_truncated in zip(prompts, answers, truncated or [False] * len(answers), strict=True)
        ]
