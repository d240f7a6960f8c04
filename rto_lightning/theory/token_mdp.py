"""The token MDP of arXiv 2404.18922, section 3.1, small enough to be written out: every state is a prefix.

One prompt, a vocabulary of ``A`` tokens, and responses of exactly ``H`` tokens. A prefix of ``h`` tokens is the integer
that they spell in base ``A``, so token ``a`` leads from state ``s`` to state ``s * A + a``: flattening what belongs to
the state-action pairs of one depth gives what belongs to the states of the next, and no table of transitions is needed.

There is no end token. A response that ends early can be read as one that goes on with rewards of 0, as in the paper's
first footnote. Several prompts are several such MDPs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rto_lightning.errors import UserError

MAXIMUM_STATES = 2**25
"""About 270 MB for each number that is kept for all states, in float64."""

Layers = tuple[Tensor, ...]
"""One tensor a depth ``h = 0 .. H - 1``, float64. What belongs to states has shape ``(A**h,)``, what belongs to
state-action pairs ``(A**h, A)``, and features have shape ``(A**h, A, d)``."""


@dataclass(frozen=True)
class TokenMDP:
    """Deterministic MDP whose states are the prefixes of a response.

    Raises:
        UserError: If it has no choice, no step, or more than `MAXIMUM_STATES` states.
    """

    vocabulary_size: int
    """Number of tokens, ``A``, at least 2."""
    horizon: int
    """Number of tokens of every response, ``H``, at least 1."""

    def __post_init__(self) -> None:
        if self.vocabulary_size < 2 or self.horizon < 1:
            raise UserError(
                f"A token MDP needs 2 tokens and 1 step at least, but has {self.vocabulary_size} and {self.horizon}; "
                "choose more."
            )
        if self.states > MAXIMUM_STATES:
            raise UserError(
                f"{self.vocabulary_size} tokens and {self.horizon} steps make {self.states:,} states, and the limit is "
                f"{MAXIMUM_STATES:,}; choose a smaller vocabulary or horizon."
            )

    @property
    def responses(self) -> int:
        """Number of complete responses, ``A**H``."""
        return int(self.vocabulary_size**self.horizon)

    @property
    def states(self) -> int:
        """Number of prefixes, from the empty one to the complete responses."""
        return (self.vocabulary_size * self.responses - 1) // (self.vocabulary_size - 1)

    @property
    def layer_shapes(self) -> list[tuple[int, int]]:
        """Shape of what belongs to state-action pairs, for each depth."""
        return [(self.vocabulary_size**depth, self.vocabulary_size) for depth in range(self.horizon)]


def path_sums(layers: Layers) -> Tensor:
    """Sum over the tokens of each response: the sentence reward of token rewards, the log-probability of a log-policy.

    Args:
        layers: Of state-action pairs, each ``(A**h, A)``, or features, each ``(A**h, A, d)``.

    Returns:
        Shape ``(A**H,)`` or ``(A**H, d)``.
    """
    sums = torch.zeros_like(layers[0][:, 0])
    for layer in layers:
        sums = (sums.unsqueeze(1) + layer).flatten(0, 1)
    return sums


def at_last_token(mdp: TokenMDP, sentence_rewards: Tensor) -> Layers:
    """Token rewards that are 0 but on the last token, which earns the sentence reward (equation 2.3).

    Args:
        mdp: The MDP.
        sentence_rewards: Shape ``(A**H,)``.

    Returns:
        Token rewards.
    """
    *before, last = mdp.layer_shapes
    return (*(sentence_rewards.new_zeros(()).expand(shape) for shape in before), sentence_rewards.view(last))


def response_tokens(mdp: TokenMDP, responses: Tensor) -> Tensor:
    """Tokens of responses that are given by their numbers.

    Args:
        mdp: The MDP.
        responses: int64, shape ``(N,)``.

    Returns:
        int64, shape ``(N, H)``.
    """
    powers = mdp.vocabulary_size ** torch.arange(mdp.horizon - 1, -1, -1)
    return responses[:, None] // powers % mdp.vocabulary_size


def token_policy(mdp: TokenMDP, probabilities: Tensor) -> Layers:
    """Log-probabilities of a policy that draws every token alike, whatever came before. The layers share memory.

    Args:
        mdp: The MDP.
        probabilities: Of the tokens, float64, shape ``(A,)``.

    Returns:
        Log-probabilities; minus infinity for a token that is never drawn, which only `sample_responses` takes.
    """
    return tuple(probabilities.log().expand(shape) for shape in mdp.layer_shapes)


def uniform_log_policy(mdp: TokenMDP) -> Layers:
    """Log-probabilities of the policy that draws all tokens equally often. The layers share memory."""
    return token_policy(mdp, torch.full((mdp.vocabulary_size,), 1 / mdp.vocabulary_size, dtype=torch.float64))


def random_layers(mdp: TokenMDP, generator: torch.Generator) -> Layers:
    """A standard normal number for every state-action pair, to be used as rewards or as the logits of a policy."""
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in mdp.layer_shapes)


def log_softmax(logits: Layers) -> Layers:
    """Log-probabilities of the policy with these logits."""
    return tuple(layer.log_softmax(dim=-1) for layer in logits)


def sample_responses(log_policy: Layers, count: int, generator: torch.Generator) -> Tensor:
    """Draw responses from a policy.

    Args:
        log_policy: Log-probabilities of the tokens.
        count: How many, ``N``.
        generator: Source of randomness.

    Returns:
        Numbers of the responses, int64, shape ``(N,)``.
    """
    return torch.multinomial(path_sums(log_policy).exp(), count, replacement=True, generator=generator)
