"""Rollouts with transformers' `generate`, inside the training process."""

from dataclasses import dataclass

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from rto_lightning.backbone import PolicyBackbone
from rto_lightning.errors import UserError, check_settings
from rto_lightning.rollout.sampling import SeededSampling
from rto_lightning.rollout.trajectory import Trajectory


@dataclass
class RolloutSettings:
    """How responses are sampled. PPO needs samples of the policy itself, so there is no top-p and no top-k."""

    max_new_tokens: int = 256
    """Length limit of a response in tokens, the stop id included."""
    temperature: float = 1.0
    """Divides the policy's logits, and those of the KL reference. 0 is greedy, for `predict` only."""
    responses_per_prompt: int = 1
    """Responses to each prompt in training; held-out prompts get one."""
    batch_size: int | None = None
    """Responses that are sampled at a time; null takes all of the iteration at once."""

    def __post_init__(self) -> None:
        """Raise UserError for values that no run can use."""
        positive = ("max_new_tokens", "responses_per_prompt", "batch_size")
        check_settings("model.rollout", self, positive, not_negative=("temperature",))

    def check_length(self, min_response_tokens: int) -> None:
        """Raise UserError if no response can have as many tokens as `rewards.min_response_tokens` asks for."""
        if min_response_tokens > self.max_new_tokens:
            raise UserError(
                f"rewards.min_response_tokens {min_response_tokens} is above rollout.max_new_tokens "
                f"{self.max_new_tokens}, so that every response would pay; set it lower."
            )


class TransformersEngine:
    """Samples a response to each prompt as one role of the backbone.

    Args:
        backbone: the model and its roles.
        settings: length, temperature and batch size.
    """

    def __init__(self, backbone: PolicyBackbone, settings: RolloutSettings) -> None:
        self.backbone = backbone
        self.settings = settings

    def rollout(self, role: str, input_ids: Tensor, attention_mask: Tensor, seeds: list[int]) -> Trajectory:
        """Sample one response for each prompt.

        Args:
            role: who speaks.
            input_ids: left-padded prompts, (B, P) int64.
            attention_mask: 1 on prompt tokens, (B, P).
            seeds: one for each prompt; the same seed and prompt give the same response in any batch, as far as the
                arithmetic of the model does.
        """
        size = self.settings.batch_size or len(seeds)
        parts = [
            self._generate(role, input_ids[i : i + size], attention_mask[i : i + size], seeds[i : i + size])
            for i in range(0, len(seeds), size)
        ]
        return Trajectory.concatenate(parts, self.backbone.chat.pad_id)

    def _generate(self, role: str, input_ids: Tensor, attention_mask: Tensor, seeds: list[int]) -> Trajectory:
        chat, settings = self.backbone.chat, self.settings
        config = GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,
            eos_token_id=list(chat.stop_ids),
            pad_token_id=chat.pad_id,
        )
        processors = LogitsProcessorList()
        if settings.temperature > 0:
            processors.append(SeededSampling(seeds, settings.max_new_tokens, settings.temperature))
        tokens = self.backbone.generate(role, input_ids, attention_mask, config, logits_processor=processors)
        return Trajectory.from_tokens(tokens, attention_mask, chat.stop_ids)
