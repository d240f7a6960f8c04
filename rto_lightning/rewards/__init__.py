"""Where the sentence-level score comes from: a reward role, an outside model, a Python function, an HTTP service."""

from rto_lightning.rewards.build import WeightedReward, make_reward_source, make_scores, saved_reward_role
from rto_lightning.rewards.function import FunctionReward
from rto_lightning.rewards.normalization import ScoreNormalizer, score_statistics
from rto_lightning.rewards.outside_model import OutsideRewardModel
from rto_lightning.rewards.remote import RemoteReward, RewardServiceSettings
from rto_lightning.rewards.role import RoleReward
from rto_lightning.rewards.source import RewardSource
from rto_lightning.rewards.weighted import WeightedScores

__all__ = [
    "FunctionReward",
    "OutsideRewardModel",
    "RemoteReward",
    "RewardServiceSettings",
    "RewardSource",
    "RoleReward",
    "ScoreNormalizer",
    "WeightedReward",
    "WeightedScores",
    "make_reward_source",
    "make_scores",
    "saved_reward_role",
    "score_statistics",
]
