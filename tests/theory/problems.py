"""Small random problems for the tests of the theory."""

from dataclasses import dataclass

import hypothesis.strategies as st
import torch
from torch import Tensor

from rto_lightning.theory import (
    Layers,
    Preferences,
    TokenMDP,
    linear_rewards,
    log_softmax,
    path_sums,
    random_features,
    random_layers,
    response_tokens,
    sample_preferences,
    sample_responses,
)


@dataclass(frozen=True)
class Problem:
    """An MDP with random rewards, a random reference policy and another random policy."""

    mdp: TokenMDP
    rewards: Layers
    log_reference: Layers
    log_policy: Layers
    beta: float

    @property
    def tokens(self) -> Tensor:
        """Tokens of all responses, shape ``(A**H, H)``."""
        return response_tokens(self.mdp, torch.arange(self.mdp.responses))

    @property
    def optimal_response_logprobs(self) -> Tensor:
        """Of the Gibbs distribution over whole responses (the paper's lemma C.1), shape ``(A**H,)``."""
        scores = path_sums(self.log_reference) + path_sums(self.rewards) / self.beta
        return scores.log_softmax(dim=0)


def problem(vocabulary_size: int, horizon: int, beta: float, seed: int) -> Problem:
    mdp = TokenMDP(vocabulary_size, horizon)
    generator = torch.Generator().manual_seed(seed)
    rewards, reference, policy = (random_layers(mdp, generator) for _ in range(3))
    return Problem(mdp, rewards, log_softmax(reference), log_softmax(policy), beta)


PROBLEMS = st.builds(problem, st.integers(2, 4), st.integers(1, 4), st.floats(0.2, 3), st.integers(0, 10_000))


def linear_problem(dimension: int, pairs: int, seed: int, norm: float = 0.4) -> tuple[Layers, Tensor, Preferences]:
    """Random features, a theta of the given norm, and preferences between uniform responses of 3 out of 3 tokens."""
    generator = torch.Generator().manual_seed(seed)
    mdp = TokenMDP(3, 3)
    features = random_features(mdp, dimension, generator)
    theta = torch.randn(dimension, generator=generator, dtype=torch.float64)
    theta = norm * theta / theta.norm()
    uniform = log_softmax(tuple(torch.zeros(shape, dtype=torch.float64) for shape in mdp.layer_shapes))
    first, second = (sample_responses(uniform, pairs, generator) for _ in range(2))
    scores = path_sums(linear_rewards(features, theta))
    return features, theta, sample_preferences(scores, first, second, generator)


def largest_difference(first: Layers, second: Layers) -> float:
    """Largest difference between the elements of two sets of layers."""
    return max((a - b).abs().max().item() for a, b in zip(first, second, strict=True))
