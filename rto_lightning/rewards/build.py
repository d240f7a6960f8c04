"""Choose the reward source that the settings name."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rto_lightning.backbone import PolicyBackbone
from rto_lightning.backbone.roles import RoleCard, role_folder
from rto_lightning.errors import UserError
from rto_lightning.rewards.function import FunctionReward
from rto_lightning.rewards.outside_model import OutsideRewardModel
from rto_lightning.rewards.role import RoleReward
from rto_lightning.rewards.source import RewardSource
from rto_lightning.rewards.weighted import WeightedScores


@dataclass
class WeightedReward:
    """One of several sources of scores."""

    reward: str | None = None
    """Saved reward role, or folder or hub name of a sequence-classification model with one label."""
    reward_function: str | None = None
    """A Python function `module:function`, in the place of `reward`."""
    weight: float = 1.0
    """Its score, normalised if `rewards.normalize_score` is set, is multiplied by this before the sources are added."""

    def __post_init__(self) -> None:
        """Raise UserError unless exactly one source is named."""
        if (self.reward is None) == (self.reward_function is None):
            raise UserError("each of model.more_rewards names one source; set either reward or reward_function.")


def saved_reward_role(reward: str | None) -> Path | None:
    """The folder of `reward` if it is a role saved by this project; None for an outside model.

    Raises:
        MissingInputError: if it is a path of which nothing exists.
    """
    folder = role_folder(reward, "reward") if reward is not None else None
    return folder if folder is not None and RoleCard.read(folder) is not None else None


def make_reward_source(
    backbone: PolicyBackbone, reward: str | None, reward_function: str | None, role: str = "reward"
) -> RewardSource:
    """The source of scores; a saved reward role is added to the backbone.

    Args:
        backbone: where a saved role is added.
        reward: saved reward role, or folder or hub name of a sequence-classification model.
        reward_function: `module:function`, in the place of `reward`.
        role: name of the role that is added.
    """
    if reward_function is not None:
        return FunctionReward(reward_function, backbone.chat)
    assert reward is not None
    if saved_reward_role(reward) is not None:
        backbone.add_role(role, reward, scalar_head=True)
        return RoleReward(backbone, role, reward)
    return OutsideRewardModel(reward, backbone.chat, backbone.settings.frozen_dtype)


def make_scores(backbone: PolicyBackbone, sources: Sequence[WeightedReward], normalize: bool) -> WeightedScores:
    """All sources of a run; saved roles become the roles `reward`, `reward_2` and so on, and bring their statistics.

    Args:
        backbone: where saved roles are added.
        sources: what gives scores.
        normalize: whether scores are normalised.
    """
    roles = ["reward" if number == 1 else f"reward_{number}" for number in range(1, len(sources) + 1)]
    made = [
        make_reward_source(backbone, source.reward, source.reward_function, role)
        for role, source in zip(roles, sources, strict=True)
    ]
    scores = WeightedScores(made, [source.weight for source in sources], normalize)
    for number, role in enumerate(roles):
        card = backbone.cards.get(role)
        if card is not None and card.score_mean is not None and card.score_std is not None:
            scores.normalizer(number).set(card.score_mean, card.score_std)
    return scores
