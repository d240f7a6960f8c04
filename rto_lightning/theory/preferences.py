"""Preferences between responses, and rewards that are linear in known features."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rto_lightning.theory.token_mdp import Layers, TokenMDP


@dataclass(frozen=True)
class Preferences:
    """A data set of pairs of responses, given by their numbers."""

    chosen: Tensor
    """The preferred response of each pair; int64, shape ``(N,)``."""
    rejected: Tensor
    """The other one; int64, shape ``(N,)``."""


def sample_preferences(
    sentence_rewards: Tensor, first: Tensor, second: Tensor, generator: torch.Generator
) -> Preferences:
    r"""Label pairs by the model of Bradley and Terry (arXiv 2404.18922, equations 2.1 and 3.1).

    .. math::
        P(y^1 \succ y^2) = \sigma(r(y^1) - r(y^2))

    Preferences from token rewards are those from their sums, `path_sums`.

    Args:
        sentence_rewards: Reward of each response, shape ``(A**H,)``.
        first: Numbers of the first responses of the pairs; int64, shape ``(N,)``.
        second: Numbers of the second responses.
        generator: Source of randomness.

    Returns:
        The labelled pairs.
    """
    probabilities = torch.sigmoid(sentence_rewards[first] - sentence_rewards[second])
    first_wins = torch.rand(probabilities.shape, generator=generator, dtype=torch.float64) < probabilities
    return Preferences(torch.where(first_wins, first, second), torch.where(first_wins, second, first))


def linear_rewards(features: Layers, theta: Tensor) -> Layers:
    r"""Token rewards :math:`r(s, a) = \phi(s, a)^\top \theta` (assumption 4.1).

    Args:
        features: Each ``(A**h, A, d)``.
        theta: Shape ``(d,)``.

    Returns:
        Token rewards.
    """
    return tuple(layer @ theta for layer in features)


def token_features(mdp: TokenMDP) -> Layers:
    """Features that say which token it is, ``d = A - 1``; token 0 has features 0.

    With a feature for token 0 too, adding a number to all rewards would change no preference between responses of one
    length: that direction of theta could not be learned.
    """
    one_hot = torch.eye(mdp.vocabulary_size, dtype=torch.float64)[:, 1:]
    return tuple(one_hot.expand(states, *one_hot.shape) for states, _ in mdp.layer_shapes)


def random_features(mdp: TokenMDP, dimension: int, generator: torch.Generator) -> Layers:
    """Features drawn from the unit sphere, for each state-action pair by itself.

    Args:
        mdp: The MDP.
        dimension: Number of features, ``d``.
        generator: Source of randomness.

    Returns:
        Features.
    """
    normals = (torch.randn((*shape, dimension), generator=generator, dtype=torch.float64) for shape in mdp.layer_shapes)
    return tuple(layer / layer.norm(dim=-1, keepdim=True) for layer in normals)
