"""Scores by a reward role of the backbone."""

from torch import Tensor

from rto_lightning.backbone import Message, PolicyBackbone
from rto_lightning.rollout import Trajectory


class RoleReward:
    """The scalar head of a reward role at the last response token.

    Args:
        backbone: the backbone that has the role.
        role: `reward`, or `reward_2` and so on where there are several.
        source: where the role was saved, for messages.
    """

    takes_all = False

    def __init__(self, backbone: PolicyBackbone, role: str, source: str) -> None:
        self.backbone = backbone
        self.role = role
        self.name = f"the {role} role {source}"

    def score(self, prompts: list[list[Message]], trajectory: Trajectory) -> Tensor:
        """See :meth:`RewardSource.score`."""
        return self.backbone.sequence_scores(self.role, trajectory.sequences).float()
