"""Choose the reward source that the settings name."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rto_lightning.backbone import PolicyBackbone
from rto_lightning.backbone.roles import RoleCard, role_folder
from rto_lightning.errors import UserError
from rto_lightning.rewards.function import FunctionReward
from rto_lightning.rewards.outside_model import OutsideRewardModel
from rto_lightning.rewards.remote import RemoteReward, RewardServiceSettings, service_urls
from rto_lightning.rewards.role import RoleReward
from rto_lightning.rewards.source import RewardSource
from rto_lightning.rewards.weighted import WeightedScores


@dataclass(frozen=True)
class WeightedReward:
    """One of several sources of scores."""

    reward: str | None = None
    """Saved reward role, or folder or hub name of a sequence-classification model with one label."""
    reward_function: str | None = None
    """A Python function `module:function`, in the place of `reward`."""
    reward_url: list[str] | str | None = None
    """Address of an HTTP reward service, or of several that give the same scores, in the place of `reward`."""
    weight: float = 1.0
    """Its score, normalised if `rewards.normalize_score` is set, is multiplied by this before the sources are added."""
    reward_service: RewardServiceSettings = field(default_factory=RewardServiceSettings)
    """How the service is asked."""

    def __post_init__(self) -> None:
        """Raise UserError unless exactly one source is named, and that, if it is a service, by its HTTP address."""
        if [self.reward, self.reward_function, self.reward_url].count(None) != 2:
            raise UserError(
                "each of model.more_rewards names one source; set either reward or reward_function or reward_url."
            )
        if self.reward_url is not None:
            service_urls(self.reward_url)


def saved_reward_role(reward: str | None) -> Path | None:
    """The folder of `reward` if it is a role saved by this project; None for an outside model.

    Raises:
        MissingInputError: if it is a path of which nothing exists.
    """
    folder = role_folder(reward, "reward") if reward is not None else None
    return folder if folder is not None and RoleCard.read(folder) is not None else None


def make_reward_source(backbone: PolicyBackbone, source: WeightedReward, role: str = "reward") -> RewardSource:
    """The source of scores; a saved reward role is added to the backbone.

    Args:
        backbone: where a saved role is added.
        source: what gives scores.
        role: name of the role that is added.
    """
    if source.reward_function is not None:
        return FunctionReward(source.reward_function, backbone.chat)
    if source.reward_url is not None:
        return RemoteReward(source.reward_url, source.reward_service, backbone.chat)
    reward = source.reward
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
    made = [make_reward_source(backbone, source, role) for role, source in zip(roles, sources, strict=True)]
    scores = WeightedScores(made, [source.weight for source in sources], normalize)
    for number, role in enumerate(roles):
        card = backbone.cards.get(role)
        if card is not None and card.score_mean is not None and card.score_std is not None:
            scores.normalizer(number).set(card.score_mean, card.score_std)
    return scores
