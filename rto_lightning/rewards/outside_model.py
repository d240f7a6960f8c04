"""Scores by a reward model with a tokenizer of its own."""

import sys

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from rto_lightning.backbone import ChatTokenizer, Message, Sequences
from rto_lightning.backbone.loading import context_length, load_chat_tokenizer_from, load_pretrained
from rto_lightning.errors import UserError
from rto_lightning.rollout import Trajectory, response_texts


class OutsideRewardModel(nn.Module):
    """An `AutoModelForSequenceClassification` with one label; responses are decoded and encoded again for it.

    Args:
        model: hub name or local folder of the reward model.
        policy_chat: turns the policy's tokens into text.
        dtype: data type of the weights.

    Raises:
        UserError: if the model cannot be loaded or gives more than one score; when it scores, if a prompt and its
            response are longer than its context.
    """

    takes_all = False

    def __init__(self, model: str, policy_chat: ChatTokenizer, dtype: torch.dtype) -> None:
        super().__init__()
        self.name = model
        self.policy_chat = policy_chat
        self.chat = load_chat_tokenizer_from(model)
        self.model = load_pretrained(AutoModelForSequenceClassification, model, dtype=dtype)
        if self.model.config.num_labels != 1:
            raise UserError(
                f"the reward model {model} has {self.model.config.num_labels} labels; "
                "one that gives a single score is needed."
            )
        self.context_length = context_length(self.model.config)
        """Tokens of a prompt and its response that the model takes."""
        # The model's own head chooses the position it was trained on, the last token that is not padding.
        if self.model.config.pad_token_id is None:
            self.model.config.pad_token_id = self.chat.pad_id
        self.model.requires_grad_(False).eval()

    @torch.no_grad()
    def score(self, prompts: list[list[Message]], trajectory: Trajectory) -> Tensor:
        """See :meth:`RewardSource.score`."""
        encoded_prompts = [self.chat.encode_prompt(messages) for messages in prompts]
        texts = response_texts(trajectory, self.policy_chat)
        responses = [self.chat.encode_response(text, sys.maxsize) for text in texts]
        for response, truncated in zip(responses, trajectory.truncated.tolist(), strict=True):
            if truncated and response[-1] in self.chat.stop_ids:
                response.pop()  # it never ended, and is scored as it is
        joined = [prompt + response for prompt, response in zip(encoded_prompts, responses, strict=True)]
        longest = max(map(len, joined))
        if longest > self.context_length:
            raise UserError(
                f"a prompt with its response has {longest} tokens for the reward model {self.name}, which takes "
                f"{self.context_length}; lower data.max_prompt_tokens or rollout.max_new_tokens."
            )
        sequences = Sequences.from_lists([[] for _ in joined], joined, self.model.config.pad_token_id).to(
            trajectory.truncated.device
        )
        logits = self.model(input_ids=sequences.input_ids, attention_mask=sequences.attention_mask).logits
        scores: Tensor = logits.squeeze(-1).float()
        return scores
