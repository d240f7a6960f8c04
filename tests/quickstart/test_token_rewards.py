"""Token rewards beside the gold weights of the same tokens."""

import pytest

from rto_lightning.errors import UserError
from rto_lightning.quickstart.gold import STOP, gold_token_rewards
from rto_lightning.quickstart.grammar import Request
from rto_lightning.quickstart.token_rewards import token_correlation, token_reward_text

PROMPTS = [Request("kind", size, "camera", "lens").messages for size in ("small", "large", "old")]
GOOD, FAIR = "the lens is great .", "the lens is ."


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


def test_rank_correlation_by_hand() -> None:
    # Gold weights of these five tokens and the stop: -c, 1.2 - c, -c, 0.1 - c, -c, 0; three of them tie.
    tokens = [[*GOOD.split(), STOP]]
    gold_ranks = [2.0, 6.0, 2.0, 5.0, 2.0, 4.0]
    assert gold_ranks_of(tokens[0]) == gold_ranks
    # Ranks 2, 6, 1, 5, 3, 4 of the rewards: a difference of 1 in two places of the tie.
    rewards = [[-1.0, 1000.0, -2.0, 0.5, -0.5, 0.0]]
    ranks = [2.0, 6.0, 1.0, 5.0, 3.0, 4.0]
    centred = [(a - 3.5, b - 3.5) for a, b in zip(ranks, gold_ranks, strict=True)]
    covariance = sum(a * b for a, b in centred)
    expected = covariance / (sum(a * a for a, _ in centred) * sum(b * b for _, b in centred)) ** 0.5
    assert token_correlation(PROMPTS[:1], tokens, rewards, ranked=True) == pytest.approx(expected)
    # Any growing function of the rewards leaves ranks as they are, and Pearson's correlation not.
    cubes = [[value**3 for value in rewards[0]]]
    assert token_correlation(PROMPTS[:1], tokens, cubes, ranked=True) == pytest.approx(expected)
    assert token_correlation(PROMPTS[:1], tokens, cubes) != pytest.approx(
        token_correlation(PROMPTS[:1], tokens, rewards), abs=1e-6
    )


def gold_ranks_of(tokens: list[str]) -> list[float]:
    """The mean place of each token's gold weight, by counting."""
    text = " ".join(token for token in tokens if token != STOP)
    weights = [weight for _, weight in gold_token_rewards(PROMPTS[0], text)]
    lower = [sum(other < weight - 1e-9 for other in weights) for weight in weights]
    equal = [sum(abs(other - weight) < 1e-9 for other in weights) for weight in weights]
    return [below + (ties + 1) / 2 for below, ties in zip(lower, equal, strict=True)]
