"""The one interface of sentence-level rewards."""

from typing import Protocol

from torch import Tensor

from rto_lightning.backbone import Message
from rto_lightning.rollout import Trajectory


class RewardSource(Protocol):
    """Scores whole responses."""

    name: str
    """What messages call it."""
    takes_all: bool
    """Whether it is given all responses at once, and not as many at a time as a forward on the device."""

    def score(self, prompts: list[list[Message]], trajectory: Trajectory) -> Tensor:
        """Score each response.

        Args:
            prompts: the messages of each prompt, B lists.
            trajectory: the same prompts and their responses as tokens.

        Returns:
            Scores (B,) float32 on the trajectory's device, in the source's own units; higher is better.

        Raises:
            UserError: if the source gives another number of scores. Of one that is NaN or infinite the stage decides.
        """
        ...
