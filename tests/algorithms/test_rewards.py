from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rto_lightning.algorithms import compose_rewards, kl_estimate, move_token_rewards, token_rewards

from .strategies import Batch, batches

PAPER: dict[str, Any] = {
    "beta_1": 0.05,
    "beta_2": 0.01,
    "beta_3": 1.0,
    "token_reward_clip": 0.05,
    "score_clip": 10.0,
}
POLICY = torch.tensor([[-1.0, -2.0, -9.0], [-1.5, -9.0, -9.0]], dtype=torch.float64)
REFERENCE = torch.tensor([[-1.5, -1.0, -9.0], [-1.5, -9.0, -9.0]], dtype=torch.float64)
DPO = torch.tensor([[-1.0, -4.0, -9.0], [-1.0, -9.0, -9.0]], dtype=torch.float64)
SCORES = torch.tensor([2.0, -30.0], dtype=torch.float64)
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_every_term_by_hand() -> None:
    terms = compose_rewards(POLICY, REFERENCE, DPO, None, SCORES, MASK, **PAPER)
    expected = {
        "token": [[0.025, -0.05, 0.0], [0.025, 0.0, 0.0]],
        "kl": [[-0.005, 0.01, 0.0], [0.0, 0.0, 0.0]],
        "score": [[0.0, 2.0, 0.0], [-10.0, 0.0, 0.0]],
        "total": [[0.02, 1.96, 0.0], [-9.975, 0.0, 0.0]],
    }
    for name, numbers in expected.items():
        torch.testing.assert_close(getattr(terms, name), torch.tensor(numbers, dtype=torch.float64))


def test_scores_are_clipped_before_they_are_scaled() -> None:
    terms = compose_rewards(POLICY, REFERENCE, DPO, None, SCORES, MASK, **PAPER | {"beta_3": 0.5})
    assert terms.score.sum(dim=1).tolist() == [1.0, -5.0]
    terms = compose_rewards(POLICY, REFERENCE, DPO, None, SCORES, MASK, **PAPER | {"score_clip": 0.0})
    assert terms.score.sum(dim=1).tolist() == [2.0, -30.0]


def test_truncation_penalty_is_neither_clipped_nor_scaled() -> None:
    truncated = torch.tensor([True, False])
    settings = PAPER | {"beta_3": 0.5, "truncated": truncated, "truncation_penalty": 20.0}
    terms = compose_rewards(POLICY, REFERENCE, DPO, None, SCORES, MASK, **settings)
    assert terms.score.tolist() == [[0.0, 1.0 - 20.0, 0.0], [-5.0, 0.0, 0.0]]
    terms = compose_rewards(POLICY, REFERENCE, DPO, None, None, MASK, **settings | {"beta_3": 0.0})
    assert terms.score.tolist() == [[0.0, -20.0, 0.0], [0.0, 0.0, 0.0]]


def test_too_short_responses_pay_unscaled() -> None:
    settings = PAPER | {"beta_3": 0.5, "min_response_tokens": 2, "short_penalty": 0.3}
    terms = compose_rewards(POLICY, REFERENCE, DPO, None, SCORES, MASK, **settings)
    assert terms.score.tolist() == [[0.0, 1.0, 0.0], [-5.3, 0.0, 0.0]]
    terms = compose_rewards(POLICY, REFERENCE, DPO, None, SCORES, MASK, **settings | {"min_response_tokens": 3})
    assert terms.score.tolist() == [[0.0, 0.7, 0.0], [-5.3, 0.0, 0.0]]
    empty = torch.zeros_like(MASK)
    terms = compose_rewards(POLICY, REFERENCE, DPO, None, SCORES, empty, **settings)
    assert not terms.total.any()


def test_token_rewards_are_clipped_before_they_are_moved() -> None:
    terms = compose_rewards(POLICY, REFERENCE, DPO, None, SCORES, MASK, granularity="delayed", **PAPER)
    # 0.025 - 0.05; clipping the sum 0.025 - 0.15 would leave -0.05.
    torch.testing.assert_close(terms.token, torch.tensor([[0, -0.025, 0], [0.025, 0, 0]], dtype=torch.float64))


@given(batches(), st.sampled_from(["token", "sentence", "delayed", "shaping"]))
def test_granularity_moves_the_token_term_only(batch: Batch, granularity: str) -> None:
    policy, reference, dpo, scores = batch.logprobs(), batch.logprobs(), batch.logprobs(), batch.scores()
    ends = batch.normal() > 0
    plain = compose_rewards(policy, reference, dpo, None, scores, batch.mask, **PAPER)
    moved = compose_rewards(
        policy, reference, dpo, None, scores, batch.mask, granularity=granularity, sentence_ends=ends, **PAPER
    )
    assert torch.equal(moved.token, move_token_rewards(plain.token, batch.mask, granularity, ends))
    assert torch.equal(moved.kl, plain.kl)
    assert torch.equal(moved.score, plain.score)


def test_dpo_is_read_against_its_own_reference() -> None:
    terms = compose_rewards(POLICY, REFERENCE, DPO, DPO - 0.5, SCORES, MASK, **PAPER)
    torch.testing.assert_close(terms.token, 0.025 * MASK.double())
    # The KL penalty keeps the other one.
    torch.testing.assert_close(terms.kl, -0.01 * (POLICY - REFERENCE))


@given(batches())
def test_ppo_is_rto_without_token_rewards(batch: Batch) -> None:
    policy, reference, dpo, scores = batch.logprobs(), batch.logprobs(), batch.logprobs(), batch.scores()
    ppo = PAPER | {"beta_1": 0.0}
    with_dpo = compose_rewards(policy, reference, dpo, None, scores, batch.mask, **ppo)
    without_dpo = compose_rewards(policy, reference, None, None, scores, batch.mask, **ppo)
    assert torch.equal(with_dpo.total, without_dpo.total)
    assert not without_dpo.token.any()


@given(batches(), st.sampled_from(["k1", "k2", "k3"]))
def test_terms_are_the_functions_they_name(batch: Batch, estimator: str) -> None:
    policy, reference, dpo, scores = batch.logprobs(), batch.logprobs(), batch.logprobs(), batch.scores()
    terms = compose_rewards(policy, reference, dpo, None, scores, batch.mask, kl_estimator=estimator, **PAPER)
    assert torch.equal(terms.token, token_rewards(dpo, reference, batch.mask, 0.05, 0.05))
    torch.testing.assert_close(terms.kl, -0.01 * kl_estimate(policy, reference, batch.mask, estimator))
    torch.testing.assert_close(terms.total, terms.token + terms.kl + terms.score)
    torch.testing.assert_close(terms.score.sum(dim=1), scores * batch.mask.any(dim=1))


@given(batches())
def test_policy_that_is_the_reference_pays_no_kl(batch: Batch) -> None:
    policy = batch.logprobs()
    terms = compose_rewards(policy, policy, batch.logprobs(), None, batch.scores(), batch.mask, **PAPER)
    assert not terms.kl.any()


@given(batches())
def test_garbage_outside_the_mask_changes_nothing(batch: Batch) -> None:
    inputs = [batch.logprobs() for _ in range(4)]
    scores = batch.scores()
    clean = compose_rewards(*inputs, scores, batch.mask, **PAPER)
    spoilt = compose_rewards(*map(batch.spoil, inputs), scores, batch.mask, **PAPER)
    for name in ("token", "kl", "score", "total"):
        assert torch.equal(getattr(spoilt, name), getattr(clean, name))
        assert not getattr(clean, name)[~batch.mask].any()


@pytest.mark.parametrize(
    ("missing", "coefficient"),
    [("dpo_logprobs", "beta_1"), ("scores", "beta_3"), ("truncated", "truncation_penalty")],
)
def test_term_without_its_input_is_refused(missing: str, coefficient: str) -> None:
    inputs = {"dpo_logprobs": DPO, "scores": SCORES, "truncated": torch.tensor([True, False])}
    inputs[missing] = None
    with pytest.raises(ValueError, match=rf"^{coefficient} is .*, which needs {missing};"):
        compose_rewards(
            POLICY,
            REFERENCE,
            mask=MASK,
            dpo_reference_logprobs=None,
            truncation_penalty=1.0,
            **inputs,
            **PAPER,
        )
