"""How many responses must be scored to find the best one (arXiv 2404.18922, section 3.3 and proposition 3.2).

A strong language model is the judge, and its most probable response the best. A query names a response and is answered
by the judge's log-probability of the response, or of each of its tokens (equation 3.6). The learner knows ``xi``: some
response has a probability of ``A**-xi`` or more (assumption 3.1). It ends when no other response can be better than the
best it saw.

The token learner follows the proof: the first prefix of a response whose probability is below ``A**-xi`` cannot lead to
the best one, and no later response needs to have that prefix. The proof counts the prefixes that can be found so, and
gets ``A**min(xi + 1, H)``, as if the prefixes with a probability of ``A**-xi`` or more ended at depth ``xi``. They may
go on to depth ``H``, and each depth beyond adds up to ``(A - 1) * A**xi`` others, which `token_query_bound` counts.

So the proposition's number does not hold for every judge. Let ``A = 2``, ``xi = 1``, and the judge be a `needle_judge`:
an answer says how many of the first tokens are right, and no more. If the first token that is not known yet is wrong in
every query, every answer leaves half of the responses that could be the best. No learner is sure of it before it has
asked ``H`` times, where the proposition has 4. The gap that it is about remains: the number of queries grows by
addition with ``H``, where ``A**H`` grows by multiplication.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from rto_lightning.theory.token_mdp import Layers, TokenMDP, path_sums, response_tokens

TOLERANCE = 1e-12
"""Probabilities that are this near count as equal: they are made by exp and log."""


class Search(NamedTuple):
    """What a learner found."""

    best: int
    """Number of the best response."""
    queries: int
    """How many responses it asked for."""


def proposition_bound(mdp: TokenMDP, xi: float) -> float:
    r"""Queries that are enough with token rewards by proposition 3.2, :math:`A^{\min(\xi + 1, H)}`."""
    return float(mdp.vocabulary_size ** min(xi + 1, mdp.horizon))


def token_query_bound(mdp: TokenMDP, xi: float) -> int:
    r"""Queries that are enough with token rewards, whatever the judge.

    .. math::
        1 + (A - 1) \sum_{h = 0}^{H - 1} \min(A^h, \lfloor A^\xi \rfloor)

    A tree in which every node has ``A`` children or none has :math:`1 + (A - 1) I` leaves if :math:`I` nodes have
    children. Here these are the prefixes shorter than ``H`` with a probability of :math:`A^{-\xi}` or more, and a depth
    has :math:`A^\xi` of them at most. For a whole number :math:`\xi < H` this is
    :math:`A^{\xi + 1} + (A - 1) A^\xi (H - \xi - 1)`.

    Args:
        mdp: The MDP.
        xi: Of assumption 3.1.

    Returns:
        Number of queries.
    """
    widest = math.floor(mdp.vocabulary_size**xi * (1 + TOLERANCE))
    inner: int = sum(min(mdp.vocabulary_size**depth, widest) for depth in range(mdp.horizon))
    return 1 + (mdp.vocabulary_size - 1) * inner


def smallest_xi(log_judge: Layers) -> float:
    r"""The smallest :math:`\xi` of assumption 3.1: the best response has the probability :math:`A^{-\xi}`."""
    return -path_sums(log_judge).max().item() / math.log(log_judge[0].shape[1])


def search_by_sentence_rewards(log_judge: Layers) -> Search:
    """Find the best response by trying one after the other.

    Args:
        log_judge: Log-probabilities of the judge, read only to answer the queries.

    Returns:
        The best response, and the number of queries.
    """
    best, highest, unseen = 0, 0.0, 1.0
    queries = 0
    for response, probability in enumerate(path_sums(log_judge).exp().tolist()):
        queries += 1
        unseen -= probability
        if probability > highest:
            best, highest = response, probability
        if highest >= unseen - TOLERANCE:
            break
    return Search(best, queries)


def search_by_token_rewards(mdp: TokenMDP, log_judge: Layers, xi: float) -> Search:
    """Find the best response by the exploration of the proof of proposition 3.2.

    Args:
        mdp: The MDP.
        log_judge: Log-probabilities of the judge, read only to answer the queries.
        xi: For which assumption 3.1 holds.

    Returns:
        The best response, and the number of queries.
    """
    threshold = mdp.vocabulary_size**-xi * (1 - TOLERANCE)
    excluded: set[tuple[int, int]] = set()
    best, highest, unseen = 0, 0.0, 1.0
    queries = 0
    while highest < unseen - TOLERANCE:
        queries += 1
        probability, state = 1.0, 0
        for depth, token in enumerate(_first_response_outside(excluded, mdp)):
            probability *= log_judge[depth][state, token].exp().item()
            state = state * mdp.vocabulary_size + token
            if probability < threshold:
                break
        else:
            if probability > highest:
                best, highest = state, probability
        unseen -= probability
        _exclude(excluded, depth + 1, state, mdp)
    return Search(best, queries)


def _first_response_outside(excluded: set[tuple[int, int]], mdp: TokenMDP) -> list[int]:
    tokens: list[int] = []
    state = 0
    for depth in range(1, mdp.horizon + 1):
        children = range(state * mdp.vocabulary_size, (state + 1) * mdp.vocabulary_size)
        state = next(child for child in children if (depth, child) not in excluded)
        tokens.append(state % mdp.vocabulary_size)
    return tokens


def _exclude(excluded: set[tuple[int, int]], depth: int, state: int, mdp: TokenMDP) -> None:
    # A prefix all of whose continuations are excluded is excluded too, so that a search never runs into a dead end.
    excluded.add((depth, state))
    parent = state // mdp.vocabulary_size
    siblings = range(parent * mdp.vocabulary_size, (parent + 1) * mdp.vocabulary_size)
    if depth > 1 and all((depth, sibling) in excluded for sibling in siblings):
        _exclude(excluded, depth - 1, parent, mdp)


def worst_case(mdp: TokenMDP, judge: Callable[[Tensor], Layers]) -> tuple[int, int]:
    """Most queries that the learners need, over all responses that may be the best.

    Args:
        mdp: The MDP.
        judge: From the tokens of a response, shape ``(H,)``, to the log-probabilities of a judge who likes it best.

    Returns:
        The most that are needed with sentence rewards, and with token rewards.
    """
    judges = [judge(best) for best in response_tokens(mdp, torch.arange(mdp.responses))]
    sentence = max(search_by_sentence_rewards(log_judge).queries for log_judge in judges)
    token = max(search_by_token_rewards(mdp, log_judge, smallest_xi(log_judge)).queries for log_judge in judges)
    return sentence, token


def path_judge(mdp: TokenMDP, best: Tensor, liked: Sequence[float]) -> Layers:
    """A judge that likes one response. Beside its way all tokens are alike, and say nothing about it.

    Args:
        mdp: The MDP.
        best: Tokens of the response, int64, shape ``(H,)``.
        liked: Probability of each of its tokens after those before; the other tokens share the rest. Where there are
            fewer than ``H``, they belong to the last tokens. Before these all tokens are alike, and there is such a way
            after each beginning.

    Returns:
        Log-probabilities.
    """
    free_tokens = mdp.horizon - len(liked)
    layers = [torch.full(shape, 1 / mdp.vocabulary_size, dtype=torch.float64) for shape in mdp.layer_shapes]
    way = torch.arange(mdp.vocabulary_size**free_tokens)
    for layer, token, probability in zip(layers[free_tokens:], best[free_tokens:], liked, strict=True):
        layer[way] = (1 - probability) / (mdp.vocabulary_size - 1)
        layer[way, token] = probability
        way = way * mdp.vocabulary_size + token
    return tuple(layer.log() for layer in layers)


def needle_judge(mdp: TokenMDP, best: Tensor, probability: float = 0.5, free_tokens: int = 0) -> Layers:
    r"""A judge to whom all responses but the best are alike: sentence rewards say nothing until it is found.

    It is a `path_judge`: of each prefix, token rewards say how many of its first tokens are those of the best response.

    Args:
        mdp: The MDP.
        best: Tokens of the best response, int64, shape ``(H,)``.
        probability: Of the best response. With free tokens, of it among those that begin alike; there are
            ``A**free_tokens`` as good then, and :math:`\xi` is ``free_tokens - log_A(probability)``.
        free_tokens: Number of first tokens that are all alike, below ``H``.

    Returns:
        Log-probabilities.
    """
    steps = mdp.horizon - free_tokens
    share = (1 - probability) / (mdp.vocabulary_size**steps - 1)
    mass = [probability + share * (mdp.vocabulary_size ** (steps - depth) - 1) for depth in range(steps + 1)]
    return path_judge(mdp, best, [after / before for before, after in pairwise(mass)])


def figure_2_judge(best: Tensor) -> Layers:
    """The example of the paper's figure 2, ``A = 2, H = 3, xi = 1``: leaves of 1/2 and 1/4, six of at most 1/8.

    The paper leaves six of the numbers open. Here the prefixes beside the way to the best response have a probability
    of 1/8, 1/8 and 1/4.

    Args:
        best: Tokens of the best response, int64, shape ``(3,)``.

    Returns:
        Log-probabilities.
    """
    return path_judge(TokenMDP(vocabulary_size=2, horizon=3), best, [7 / 8, 6 / 7, 2 / 3])
