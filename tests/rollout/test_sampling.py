"""Drawing tokens: the right distribution, the same draws as a plain cumulative sum, and what is said of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rto_lightning.rollout import sample_seeds, sampling
from rto_lightning.rollout.sampling import SeededSampling, draw_tokens
from tests.rollout.oracles import cumulative_draw

CLOSEST_TO_ONE = 1 - 2.0**-53


def _logits(rows, vocabulary, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return 4 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64).to(dtype)


def test_samples_follow_the_softmax():
    """Chi-squared over 20,000 draws; the bound is the 0.9999 quantile for 5 degrees of freedom."""
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0, -torch.inf, 0.5, -0.4])
    draws = 20_000
    sample = SeededSampling(list(range(draws)), max_new_tokens=1, temperature=0.8)
    tokens = sample(logits.expand(draws, -1), torch.arange(draws), 0).tokens
    expected = (logits / 0.8).softmax(-1) * draws
    observed = torch.bincount(tokens, minlength=7).float()
    assert observed[4] == 0
    keep = expected > 0
    assert ((observed - expected)[keep] ** 2 / expected[keep]).sum() < 25.7


@given(
    vocabulary=st.integers(1, 1500),
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.5]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_draws_are_those_of_a_plain_cumulative_sum(vocabulary, seed, temperature, dtype):
    logits = _logits(8, vocabulary, seed, dtype)
    uniforms = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    assert torch.equal(
        draw_tokens(logits, uniforms, temperature).tokens, cumulative_draw(logits, uniforms, temperature)
    )


@given(vocabulary=st.integers(2, 1500), seed=st.integers(0, 10**6), allowed=st.integers(1, 5))
def test_a_token_without_probability_is_never_drawn(vocabulary, seed, allowed):
    """Also at the ends, where rounding would fall off the last token that can be drawn."""
    logits = _logits(3, vocabulary, seed)
    kept = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(seed))[:allowed]
    masked = torch.full_like(logits, -torch.inf)
    masked[:, kept] = logits[:, kept] / 4  # none is so unlikely that it rounds to nothing
    drawn = draw_tokens(masked, torch.tensor([0.0, 0.5, CLOSEST_TO_ONE], dtype=torch.float64), 1.0, True)
    assert drawn.tokens[1] in kept
    assert drawn.tokens[0] == kept.min() and drawn.tokens[2] == kept.max()
    assert drawn.logprobs.isfinite().all() and drawn.entropies.isfinite().all()


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_logprobs_and_entropies_are_those_of_the_tempered_softmax(temperature):
    logits = _logits(6, 700, 3)
    uniforms = torch.rand(6, dtype=torch.float64)
    drawn = draw_tokens(logits, uniforms, temperature, with_logprobs=True)
    expected = torch.distributions.Categorical(logits=logits.double() / (temperature or 1.0))
    assert drawn.logprobs.dtype == drawn.entropies.dtype == torch.float32
    torch.testing.assert_close(drawn.logprobs.double(), expected.log_prob(drawn.tokens), rtol=0, atol=1e-6)
    torch.testing.assert_close(drawn.entropies.double(), expected.entropy(), rtol=0, atol=1e-6)
    assert torch.equal(drawn.tokens, draw_tokens(logits, uniforms, temperature).tokens)
    if temperature == 0:
        assert torch.equal(drawn.tokens, logits.argmax(-1))


def test_a_large_batch_is_drawn_in_parts(monkeypatch):
    logits, rows = _logits(7, 300, 1), torch.arange(7)
    whole = SeededSampling(list(range(7)), 2, 1.0, with_logprobs=True)(logits, rows, 1)
    parts = []
    monkeypatch.setattr(sampling, "SAMPLED_LOGITS", 600)
    monkeypatch.setattr(
        sampling, "draw_tokens", lambda part, *rest: parts.append(len(part)) or draw_tokens(part, *rest)
    )
    split = SeededSampling(list(range(7)), 2, 1.0, with_logprobs=True)(logits, rows, 1)
    assert parts == [2, 2, 2, 1]
    assert all(torch.equal(*pair) for pair in zip(whole, split, strict=True))


def test_numbers_belong_to_the_row_and_the_step():
    logits = torch.zeros(3, 1000)
    sample = SeededSampling([5, 6, 7], 4, 1.0)
    every_step = torch.stack([sample(logits, torch.arange(3), step).tokens for step in range(4)])
    assert len(every_step.unique()) == 12
    assert torch.equal(sample(logits[:2], torch.tensor([2, 0]), 3).tokens, every_step[3, [2, 0]])


def test_seeds_differ_by_run_iteration_row_and_occurrence():
    index = torch.tensor([0, 1, 0])
    seeds = [s for seed in (1, 2) for iteration in (0, 1) for s in sample_seeds(seed, iteration, index)]
    assert len(set(seeds)) == 12
    assert sample_seeds(1, 0, index) == sample_seeds(1, 0, index)
    assert sample_seeds(1, 0, torch.tensor([1])) == sample_seeds(1, 0, index)[1:2]
