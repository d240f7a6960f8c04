"""Scores by the reward role of the backbone."""

from torch import Tensor

from rto_lightning.backbone import Message, PolicyBackbone
from rto_lightning.rollout import Trajectory


class RoleReward:
    """The scalar head of the role `reward` at the last response token.

    Args:
        backbone: the backbone that has the role.
    """

    name = "the reward role"

    def __init__(self, backbone: PolicyBackbone) -> None:
        self.backbone = backbone

    def score(self, prompts: list[list[Message]], trajectory: Trajectory) -> Tensor:
        """See :meth:`RewardSource.score`."""
        return self.backbone.sequence_scores("reward", trajectory.sequences).float()
