"""Choose the reward source that the settings name."""

from collections.abc import Sequence
from pathlib import Path

from rto_lightning.backbone import PolicyBackbone
from rto_lightning.backbone.roles import RoleCard, role_folder
from rto_lightning.rewards.function import FunctionReward
from rto_lightning.rewards.outside_model import OutsideRewardModel
from rto_lightning.rewards.role import RoleReward
from rto_lightning.rewards.source import RewardSource
from rto_lightning.rewards.weighted import WeightedScores


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
        return RoleReward(backbone, role)
    return OutsideRewardModel(reward, backbone.chat, backbone.settings.frozen_dtype)


def make_scores(
    backbone: PolicyBackbone, sources: Sequence[tuple[str | None, str | None, float]], normalize: bool
) -> WeightedScores:
    """All sources of a run; saved roles become the roles `reward`, `reward_2` and so on, and bring their statistics.

    Args:
        backbone: where saved roles are added.
        sources: `reward`, `reward_function` (see :func:`make_reward_source`) and weight of each.
        normalize: whether scores are normalised.
    """
    roles = ["reward" if number == 1 else f"reward_{number}" for number in range(1, len(sources) + 1)]
    made = [
        make_reward_source(backbone, reward, function, role)
        for role, (reward, function, _) in zip(roles, sources, strict=True)
    ]
    scores = WeightedScores(made, [weight for _, _, weight in sources], normalize)
    for number, role in enumerate(roles):
        card = backbone.cards.get(role)
        if card is not None and card.score_mean is not None and card.score_std is not None:
            scores.normalizer(number).set(card.score_mean, card.score_std)
    return scores
