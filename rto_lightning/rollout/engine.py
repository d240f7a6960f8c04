"""What samples: one interface, and the engine that the settings name."""

from typing import Protocol

from torch import Tensor

from rto_lightning.backbone import PolicyBackbone, ValueHead
from rto_lightning.rollout.settings import RolloutSettings
from rto_lightning.rollout.trajectory import Trajectory
from rto_lightning.rollout.transformers_engine import TransformersEngine
from rto_lightning.rollout.vllm import build_vllm_engine


class RolloutEngine(Protocol):
    """Samples responses as a role of the backbone."""

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
        """Sample one response for each prompt, with the weights that the role has now. Every rank has to call it.

        Args:
            role: who speaks.
            input_ids: left-padded prompts, (B, P) int64.
            attention_mask: 1 on prompt tokens, (B, P).
            seeds: one for each prompt.
            with_logprobs: also keep log-probabilities and entropies, if the engine computes as the model that is
                trained does.
            value_head: maps hidden states (N, H) of the role to values (N,), under the same condition.

        Returns:
            The trajectory, with prompts as wide as they came and rows in the order in which they came.
        """
        ...

    def close(self) -> None:
        """Give back what the engine holds; the next rollout takes it again."""
        ...


def build_engine(backbone: PolicyBackbone, settings: RolloutSettings) -> RolloutEngine:
    """The engine that `settings.engine` names. It takes memory and starts processes at its first rollout.

    Args:
        backbone: the model and its roles.
        settings: length, temperature, engine.
    """
    if settings.engine == "vllm":
        return build_vllm_engine(backbone, settings)
    return TransformersEngine(backbone, settings)
