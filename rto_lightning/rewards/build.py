"""Choose the reward source that the settings name."""

from pathlib import Path

from rto_lightning.backbone import PolicyBackbone
from rto_lightning.backbone.roles import RoleCard, role_folder
from rto_lightning.rewards.function import FunctionReward
from rto_lightning.rewards.outside_model import OutsideRewardModel
from rto_lightning.rewards.role import RoleReward
from rto_lightning.rewards.source import RewardSource


def saved_reward_role(reward: str | None) -> Path | None:
    """The folder of `reward` if it is a role saved by this project; None for an outside model.

    Raises:
        MissingInputError: if it is a path of which nothing exists.
    """
    folder = role_folder(reward, "reward") if reward is not None else None
    return folder if folder is not None and RoleCard.read(folder) is not None else None


def make_reward_source(backbone: PolicyBackbone, reward: str | None, reward_function: str | None) -> RewardSource:
    """The source of scores; a saved reward role is added to the backbone.

    Args:
        backbone: where the role `reward` is added.
        reward: saved reward role, or folder or hub name of a sequence-classification model.
        reward_function: `module:function`, in the place of `reward`.
    """
    if reward_function is not None:
        return FunctionReward(reward_function, backbone.chat)
    assert reward is not None
    if saved_reward_role(reward) is not None:
        backbone.add_role("reward", reward, scalar_head=True)
        return RoleReward(backbone)
    return OutsideRewardModel(reward, backbone.chat, backbone.settings.frozen_dtype)
