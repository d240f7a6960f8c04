"""Results lie where the inputs do: like a GPU's, tensors of the meta device refuse to meet those of the CPU."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from rto_lightning.algorithms import (
    Estimator,
    Granularity,
    compose_rewards,
    estimate_advantages,
    policy_loss,
    response_mask_from_lengths,
    value_loss,
    whiten,
)


@pytest.mark.parametrize("granularity", get_args(Granularity))
@pytest.mark.parametrize("estimator", get_args(Estimator))
def test_an_iteration_stays_on_its_device(granularity: Granularity, estimator: Estimator) -> None:
    with torch.device("meta"):
        lengths, scores, truncated = torch.zeros(4, dtype=torch.int64), torch.zeros(4), torch.zeros(4, dtype=torch.bool)
        policy, reference, dpo, values = torch.zeros(4, 4, 3)
        ends = torch.zeros(4, 3, dtype=torch.bool)
    mask = response_mask_from_lengths(lengths, width=3)
    terms = compose_rewards(
        policy,
        reference,
        dpo,
        None,
        scores,
        mask,
        beta_1=0.05,
        beta_2=0.01,
        beta_3=1.0,
        token_reward_clip=0.05,
        score_clip=10.0,
        truncated=truncated,
        truncation_penalty=1.0,
        granularity=granularity,
        sentence_ends=ends,
        min_response_tokens=2,
        short_penalty=1.0,
    )
    advantages, returns = estimate_advantages(estimator, terms, mask, 1.0, 0.95, values, group_size=2)
    loss, statistics = policy_loss(policy, policy, whiten(advantages, mask), mask, clip_range=0.2, dual_clip=3.0)
    critic_loss, clipped = value_loss(values, values, returns, mask, value_clip_range=0.2)
    results: list[Tensor] = [mask, *vars(terms).values(), loss, *vars(statistics).values(), critic_loss, clipped]
    assert {x.device.type for x in results} == {"meta"}
