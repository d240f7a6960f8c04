"""The mathematics of RTO, PPO and the preference losses: pure functions of tensors.

Nothing here knows a model, a tokenizer or a trainer; the only import is torch. Shapes are written with ``B``
for the batch and ``T`` for the response width. Masks are boolean, True on the tokens of a response. What an
input holds outside the mask, be it nan, is never read, and per-token outputs are zero there. Results have the
dtype of the inputs.
"""

from rto_lightning.algorithms.advantages import generalized_advantages, return_to_go, whiten
from rto_lightning.algorithms.bradley_terry import bradley_terry_loss
from rto_lightning.algorithms.estimators import (
    GROUP_ESTIMATORS,
    WHITENED_ESTIMATORS,
    Estimator,
    estimate_advantages,
)
from rto_lightning.algorithms.importance import engine_mismatch, truncated_importance_weights
from rto_lightning.algorithms.kl import KLEstimator, adaptive_kl_coefficient, kl_estimate
from rto_lightning.algorithms.masks import (
    last_token_index,
    masked_mean,
    masked_sum,
    place_at_last_token,
    response_mask_from_lengths,
    zero_outside,
)
from rto_lightning.algorithms.ppo import (
    Aggregation,
    PolicyLossStatistics,
    aggregate,
    explained_variance,
    policy_loss,
    value_loss,
)
from rto_lightning.algorithms.preference import PreferenceLoss, dpo_loss, ipo_loss, rdpo_loss, simpo_loss
from rto_lightning.algorithms.ranking import PairRecords, pair_accuracy, ranking_accuracies
from rto_lightning.algorithms.rewards import RewardTerms, compose_rewards
from rto_lightning.algorithms.statistics import clustered_mean_interval, fractional_ranks
from rto_lightning.algorithms.token_dpo import tdpo1_loss, tdpo2_loss
from rto_lightning.algorithms.token_rewards import (
    Granularity,
    clamp_magnitude,
    move_token_rewards,
    token_rewards,
)

__all__ = [
    "GROUP_ESTIMATORS",
    "WHITENED_ESTIMATORS",
    "Aggregation",
    "Estimator",
    "Granularity",
    "KLEstimator",
    "PairRecords",
    "PolicyLossStatistics",
    "PreferenceLoss",
    "RewardTerms",
    "adaptive_kl_coefficient",
    "aggregate",
    "bradley_terry_loss",
    "clamp_magnitude",
    "clustered_mean_interval",
    "compose_rewards",
    "dpo_loss",
    "engine_mismatch",
    "estimate_advantages",
    "explained_variance",
    "fractional_ranks",
    "generalized_advantages",
    "ipo_loss",
    "kl_estimate",
    "last_token_index",
    "masked_mean",
    "masked_sum",
    "move_token_rewards",
    "pair_accuracy",
    "place_at_last_token",
    "policy_loss",
    "ranking_accuracies",
    "rdpo_loss",
    "response_mask_from_lengths",
    "return_to_go",
    "simpo_loss",
    "tdpo1_loss",
    "tdpo2_loss",
    "token_rewards",
    "truncated_importance_weights",
    "value_loss",
    "whiten",
    "zero_outside",
]
