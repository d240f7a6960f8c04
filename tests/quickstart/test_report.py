"""The table of policies."""

import math

import pytest

from rto_lightning.errors import UserError
from rto_lightning.quickstart.gold import best_review, gold_reward
from rto_lightning.quickstart.policies import PolicyEvaluation
from rto_lightning.quickstart.report import Estimate, answers_text, policy_rows, policy_table


def evaluation(gold: list[list[float]], kl: float = 0.0, length: float = 5.0) -> PolicyEvaluation:
    """One with the same KL and length everywhere."""
    return PolicyEvaluation(gold, [[kl] * len(row) for row in gold], [[length] * len(row) for row in gold])


def test_table_by_hand() -> None:
    sft, rto = policy_rows(
        {
            "SFT": evaluation([[2.0], [2.0], [-1.0]]),
            "RTO": PolicyEvaluation([[5.0], [2.0], [-1.0]], [[1.0], [2.0], [6.0]], [[5.0], [4.0], [4.0]]),
        }
    )
    assert sft.gold.mean == pytest.approx(1.0)
    # Sample variance of (x, x, y) is (x - y)^2 / 3.
    assert sft.gold.error == pytest.approx(1.0)
    assert (sft.gain, sft.win_rate, sft.kl.mean) == (None, None, 0.0)
    assert rto.gold.mean == pytest.approx(2.0)
    assert rto.gain is not None
    assert rto.gain.mean == pytest.approx(1.0)
    assert rto.gain.error == pytest.approx(1.0)
    assert rto.win_rate == pytest.approx((1.0 + 0.5 + 0.5) / 3)
    assert rto.length.mean == pytest.approx((5 + 4 + 4) / 3)
    assert rto.kl.mean == pytest.approx(3.0)
    assert rto.kl.error == pytest.approx(math.sqrt(7.0 / 3.0))


def test_samples_of_one_prompt_count_as_one() -> None:
    _, rto = policy_rows({"SFT": evaluation([[1.0, 1.0], [0.0, 0.0]]), "RTO": evaluation([[5.0, 1.0], [0.0, 0.0]])})
    assert rto.gain is not None
    assert rto.gain.mean == pytest.approx(1.0)
    assert rto.gain.error == pytest.approx(1.0)
    assert rto.win_rate == pytest.approx((0.75 + 0.5) / 2)


def test_sums_in_another_order_are_ties() -> None:
    _, rto = policy_rows({"SFT": evaluation([[0.1 + 0.2 + 0.3]]), "RTO": evaluation([[0.3 + 0.2 + 0.1]])})
    assert rto.win_rate == 0.5


def test_a_single_prompt_has_no_standard_error() -> None:
    (row,) = policy_rows({"SFT": evaluation([[1.0, 2.0]])})
    assert row.gold.mean == 1.5
    assert math.isnan(row.gold.error)


def test_table_is_aligned_markdown() -> None:
    lines = policy_table(
        policy_rows({"SFT": evaluation([[1.0]] * 3), "RTO": evaluation([[3.25]] * 3, kl=0.5)})
    ).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert all(line.count("|") == 7 for line in lines)
    assert "gain over SFT" in lines[0] and "100.0%" in lines[3]
    assert "+2.25 ± 0.00" in lines[3] and "0.50 ± 0.00" in lines[3]


def test_evaluations_that_differ_in_size_are_refused() -> None:
    sft = evaluation([[1.0, 1.0]] * 3)
    for other in ([[1.0, 1.0]] * 2, [[1.0]] * 3, [[1.0]] * 6):
        with pytest.raises(UserError, match="RTO and SFT were evaluated on other numbers of prompts or answers"):
            policy_rows({"SFT": sft, "RTO": evaluation(other)})
    with pytest.raises(UserError, match="'SFT' was not evaluated; the policies are RTO"):
        policy_rows({"RTO": sft})


def test_an_interval_has_95_percent() -> None:
    assert Estimate(1.0, 0.5).interval == pytest.approx((0.02, 1.98))


def test_answers_stand_behind_their_gold_reward() -> None:
    prompt = [{"role": "user", "content": "write a kind review of the small camera and its lens"}]
    best = best_review(prompt)
    text = answers_text([prompt], {"SFT": ["the lens ."], "policy": [best]})
    question, sft, policy = text.splitlines()
    assert question == prompt[0]["content"]
    assert sft == f"  SFT     {gold_reward(prompt, 'the lens .'):+5.2f}  the lens ."
    assert policy == f"  policy  {gold_reward(prompt, best):+5.2f}  {best}"
    with pytest.raises(UserError, match="SFT has 0 answers to 1 prompts"):
        answers_text([prompt], {"SFT": []})
