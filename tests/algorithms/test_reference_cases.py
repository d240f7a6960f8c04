"""Agreement to 1e-9 with the published reference implementations.

``tests/fixtures/reference_cases.json`` holds inputs and outputs of the code of the authors of RTO, DPO, SimPO and
TDPO, computed in float64. Another file of the same format can be named by the environment variable
``RTO_REFERENCE_CASES``.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rto_lightning.algorithms import (
    PreferenceLoss,
    bradley_terry_loss,
    compose_rewards,
    dpo_loss,
    generalized_advantages,
    ipo_loss,
    kl_estimate,
    masked_mean,
    masked_sum,
    policy_loss,
    rdpo_loss,
    simpo_loss,
    tdpo1_loss,
    tdpo2_loss,
    token_rewards,
    value_loss,
    whiten,
)

FIXTURE = Path(__file__).parents[1] / "fixtures" / "reference_cases.json"
CASES = json.loads(Path(os.environ.get("RTO_REFERENCE_CASES", FIXTURE)).read_text(encoding="utf-8"))


def tensor(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def assert_agrees(actual: Tensor, expected: Any) -> None:
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, tensor(expected), rtol=0, atol=1e-9)


def test_the_file_has_cases_of_both_kinds() -> None:
    assert CASES["rl"] and CASES["preference"]


@pytest.mark.parametrize("garbage", [None, float("nan"), float("inf")], ids=["as-given", "nan", "inf"])
@pytest.mark.parametrize("case", CASES["rl"])
def test_rl(case: dict[str, Any], garbage: float | None) -> None:
    inputs, outputs = case["inputs"], case["outputs"]
    mask = tensor(inputs["response_mask"]).bool()

    def given(key: str) -> Tensor:
        x = tensor(inputs[key])
        return x if garbage is None else torch.where(mask, x, garbage)

    policy, reference, dpo = given("policy_logprobs"), given("reference_logprobs"), given("dpo_logprobs")
    values, scores = given("values"), tensor(inputs["rm_score"])
    beta_1, clip = inputs["beta_1"], inputs["token_reward_clip"]

    assert_agrees(token_rewards(dpo, reference, mask, beta_1, clip), outputs["token_rewards"])
    assert_agrees(kl_estimate(policy, reference, mask, "k1"), outputs["kl"])
    terms = compose_rewards(
        policy,
        reference,
        dpo,
        None,
        scores,
        mask,
        beta_1=beta_1,
        beta_2=inputs["beta_2"],
        beta_3=inputs["beta_3"],
        token_reward_clip=clip,
        score_clip=inputs["rm_score_clip"],
    )
    assert_agrees(terms.token, outputs["token_rewards"])
    assert_agrees(terms.total, outputs["rewards"])

    advantages, returns = generalized_advantages(terms.total, values, mask, inputs["gamma"], inputs["lam"])
    assert_agrees(advantages, outputs["advantages"])
    assert_agrees(returns, outputs["returns"])
    whitened = whiten(advantages, mask)
    assert_agrees(whitened, outputs["whitened_advantages"])

    loss, _ = policy_loss(given("new_policy_logprobs"), policy, whitened, mask, inputs["clip_range"])
    assert_agrees(loss, outputs["policy_loss_sequence_mean"])
    loss, _ = value_loss(given("new_values"), values, returns, mask, inputs["value_clip_range"])
    assert_agrees(loss, outputs["value_loss_sequence_mean"])


def token_logprobs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each label, predicted from the position before it, and the mask of the real ones."""
    targets = labels[:, 1:]
    logprobs = logits[:, :-1].log_softmax(dim=-1)
    return logprobs.gather(2, targets.clamp(min=0)[:, :, None]).squeeze(2), targets != -100


@pytest.mark.parametrize("case", CASES["preference"])
def test_preference(case: dict[str, Any]) -> None:
    inputs, outputs = case["inputs"], case["outputs"]
    labels, pairs, beta = torch.tensor(inputs["labels"]), inputs["n_pairs"], inputs["beta"]
    logprobs, mask = token_logprobs(tensor(inputs["logits"]), labels)
    policy = masked_sum(logprobs, mask, dim=1)
    reference = masked_sum(*token_logprobs(tensor(inputs["reference_logits"]), labels), dim=1)
    assert_agrees(policy, outputs["policy_logps"])
    assert_agrees(reference, outputs["reference_logps"])
    assert_agrees(masked_mean(logprobs, mask, dim=1), outputs["policy_logps_mean"])

    answers = (policy[:pairs], policy[pairs:], reference[:pairs], reference[pairs:])
    lengths = mask.sum(dim=1)
    means = masked_mean(logprobs, mask, dim=1)
    simpo = outputs["simpo"]
    distributions = (tensor(inputs[name])[:, :-1].log_softmax(dim=-1) for name in ("logits", "reference_logits"))
    kl = masked_sum(F.kl_div(*distributions, log_target=True, reduction="none").sum(dim=-1), mask, dim=1)
    results: dict[str, PreferenceLoss] = {
        "dpo": dpo_loss(*answers, beta),
        "cdpo": dpo_loss(*answers, beta, label_smoothing=0.1),
        "ipo": ipo_loss(*answers, beta),
        "rdpo": rdpo_loss(*answers, lengths[:pairs], lengths[pairs:], beta, outputs["rdpo"]["alpha"]),
        "simpo": simpo_loss(means[:pairs], means[pairs:], simpo["beta"], simpo["gamma"]),
        "tdpo1": tdpo1_loss(*answers, kl[:pairs], kl[pairs:], beta),
        "tdpo2": tdpo2_loss(*answers, kl[:pairs], kl[pairs:], beta, outputs["tdpo2"]["alpha"]),
    }
    for name, result in results.items():
        assert_agrees(result.losses, outputs[name]["loss"])
        if name != "rdpo":  # a closed form of the loss alone, for want of the authors' code
            assert_agrees(result.chosen_rewards, outputs[name]["chosen_rewards"])
            assert_agrees(result.rejected_rewards, outputs[name]["rejected_rewards"])

    losses = bradley_terry_loss(tensor(inputs["chosen_scores"]), tensor(inputs["rejected_scores"]))
    assert_agrees(losses.mean(), outputs["reward_model"]["loss"])
