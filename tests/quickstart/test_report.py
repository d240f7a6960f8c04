"""The quickstart's table, curves and token rewards."""

import math
import random
from pathlib import Path

import pytest

from rto_lightning.errors import UserError
from rto_lightning.quickstart.gold import STOP, gold_reward, gold_token_rewards
from rto_lightning.quickstart.grammar import Request
from rto_lightning.quickstart.report import (
    over_optimization,
    plot_learning_curves,
    policy_rows,
    policy_table,
    token_correlation,
    token_reward_text,
)

PROMPTS = [Request("kind", size, "camera", "lens").messages for size in ("small", "large", "old")]
GOOD, FAIR, BAD = "the lens is great .", "the lens is .", "i use it ."


def test_table_by_hand() -> None:
    good, fair, bad = (gold_reward(PROMPTS[0], text) for text in (GOOD, FAIR, BAD))
    responses = {"SFT": [FAIR, FAIR, BAD], "RTO": [GOOD, FAIR, BAD]}
    sft, rto = policy_rows(PROMPTS, responses, {"RTO": [1.0, 2.0, 6.0]})
    assert sft.gold.mean == pytest.approx((2 * fair + bad) / 3)
    # Sample variance of (x, x, y) is (x - y)^2 / 3.
    assert sft.gold.error == pytest.approx(abs(fair - bad) / 3)
    assert (sft.gain, sft.win_rate, sft.kl) == (None, None, None)
    assert rto.gold.mean == pytest.approx((good + fair + bad) / 3)
    assert rto.gain is not None and rto.kl is not None
    assert rto.gain.mean == pytest.approx((good - fair) / 3)
    assert rto.gain.error == pytest.approx((good - fair) / 3)
    assert rto.win_rate == pytest.approx((1.0 + 0.5 + 0.5) / 3)
    assert rto.length.mean == pytest.approx((5 + 4 + 4) / 3)
    assert rto.kl.mean == pytest.approx(3.0)
    assert rto.kl.error == pytest.approx(math.sqrt(7.0 / 3.0))


def test_samples_of_one_prompt_count_as_one() -> None:
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1]]
    _, rto = policy_rows(prompts, {"SFT": [FAIR, FAIR, FAIR], "RTO": [GOOD, FAIR, FAIR]})
    difference = gold_reward(PROMPTS[0], GOOD) - gold_reward(PROMPTS[0], FAIR)
    assert rto.gain is not None
    assert rto.gain.mean == pytest.approx(difference / 4)
    assert rto.gain.error == pytest.approx(difference / 4)
    assert rto.win_rate == pytest.approx((0.75 + 0.5) / 2)


def test_a_single_prompt_has_no_standard_error() -> None:
    (row,) = policy_rows(PROMPTS[:1], {"SFT": [FAIR]})
    assert math.isnan(row.gold.error)


def test_table_is_aligned_markdown() -> None:
    rows = policy_rows(PROMPTS, {"SFT": [FAIR] * 3, "RTO": [GOOD] * 3}, {"SFT": [0.0] * 3})
    lines = policy_table(rows).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert all(line.count("|") == 7 for line in lines)
    assert "gain over SFT" in lines[0] and "100.0%" in lines[3]
    gain = gold_reward(PROMPTS[0], GOOD) - gold_reward(PROMPTS[0], FAIR)
    assert f"{gain:+.2f} ± 0.00" in lines[3]


def test_unequal_columns_are_refused() -> None:
    with pytest.raises(UserError, match="RTO has 2 responses for 3 prompts"):
        policy_rows(PROMPTS, {"SFT": [FAIR] * 3, "RTO": [GOOD] * 2})
    with pytest.raises(UserError, match="RTO has 1 KL values for 3 prompts"):
        policy_rows(PROMPTS, {"SFT": [FAIR] * 3, "RTO": [GOOD] * 3}, {"RTO": [1.0]})
    with pytest.raises(UserError, match="baseline 'SFT' has no responses"):
        policy_rows(PROMPTS, {"RTO": [GOOD] * 3})


def curve(gold: list[float], score: list[float]) -> list[dict[str, float]]:
    pairs = zip(gold, score, strict=True)
    return [{"iteration": i, "gold": g, "score": s, "kl": 0.1 * i} for i, (g, s) in enumerate(pairs)]


def test_over_optimization_is_told() -> None:
    rising = [0.1 * i for i in range(40)]
    hump = [min(i, 40 - i) * 0.1 for i in range(40)]
    message = over_optimization(curve(hump, rising))
    assert message is not None and message.startswith("over-optimization: since iteration 20")
    assert over_optimization(curve(rising, rising)) is None
    # The gold reward fell, but so did the score: that is another trouble.
    assert over_optimization(curve(hump, hump)) is None
    # A policy that only ever got worse while the score rose: hacked from the start.
    assert over_optimization(curve([-value for value in rising], rising)) is not None


def test_noise_is_not_over_optimization() -> None:
    noisy = [1.0 + (0.3 if i % 2 else -0.3) for i in range(40)]
    assert over_optimization(curve(noisy, [0.01 * i for i in range(40)])) is None
    assert over_optimization(curve([1.0, 0.0], [0.0, 1.0])) is None
    rng = random.Random(0)
    for _ in range(20):
        flat = curve([rng.gauss(0.6, 0.12) for _ in range(60)], [rng.gauss(0.6, 0.06) for _ in range(60)])
        assert over_optimization(flat) is None


def test_learning_curves_are_a_png(tmp_path: Path) -> None:
    path = tmp_path / "plots" / "curves.png"
    runs = {"PPO": curve([0.0, 1.0, 2.0], [0.0, 0.5, 1.0]), "RTO": curve([0.0, 2.0], [0.0, 1.0])}
    runs["RTO"].append({"iteration": 2, "gold": math.nan, "kl": 0.3})
    plot_learning_curves(path, runs, {"SFT": 0.1})
    assert path.read_bytes().startswith(b"\x89PNG")


def test_token_rewards_stand_beside_gold_weights() -> None:
    tokens = [*GOOD.split(), STOP]
    rewards = [0.0, 0.04, -0.01, 0.02, 0.0, 0.0]
    lines = token_reward_text(PROMPTS[0], tokens, rewards, bar_width=4).splitlines()
    assert lines[0] == PROMPTS[0][0]["content"]
    assert [line.split()[0] for line in lines[2:8]] == tokens
    assert "+0.040     |++++" in lines[3]
    assert "-0.010    -|" in lines[4]
    weights = [weight for _, weight in gold_token_rewards(PROMPTS[0], GOOD)]
    assert f"{sum(weights):+.3f}" in lines[8] and "+0.050" in lines[8]
    assert lines[9].startswith("correlation over these 6 tokens: 0.")
    # A response cut off before its stop has no line for it.
    cut = token_reward_text(PROMPTS[0], tokens[:-1], rewards[:-1]).splitlines()
    assert STOP not in "".join(cut)


def test_token_rewards_must_match_the_tokens() -> None:
    with pytest.raises(UserError, match="1 rewards for 2 tokens"):
        token_reward_text(PROMPTS[0], ["lens", "."], [0.1])
    with pytest.raises(UserError, match="not one word"):
        token_reward_text(PROMPTS[0], ["the lens"], [0.1])


def test_token_correlation() -> None:
    tokens = [[*GOOD.split(), STOP], FAIR.split()]
    prompts = PROMPTS[:2]
    weights = [
        [weight for _, weight in gold_token_rewards(prompt, " ".join(t for t in response if t != STOP))]
        for prompt, response in zip(prompts, tokens, strict=True)
    ]
    exact = [[3.0 * value + 1.0 for value in weights[0]], [3.0 * value + 1.0 for value in weights[1][:-1]]]
    assert token_correlation(prompts, tokens, exact) == pytest.approx(1.0)
    assert token_correlation(prompts, tokens, [[0.0] * 6, [0.0] * 4]) is None
    with pytest.raises(UserError):
        token_correlation(prompts, tokens, [[0.0], [0.0]])
