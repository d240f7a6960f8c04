"""Token rewards of a DPO model beside the gold weights of the same tokens, on answers of the SFT model.

Gold weights are those of the gold reward that is a sum; the other one has none.
"""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rto_lightning.algorithms import fractional_ranks, token_rewards
from rto_lightning.backbone import ChatTokenizer, Message, PolicyBackbone
from rto_lightning.errors import UserError
from rto_lightning.quickstart.gold import STOP, gold_token_rewards
from rto_lightning.quickstart.policies import Sampler
from rto_lightning.rollout import Trajectory


class RewardedTokens(NamedTuple):
    """N answers whose tokens have rewards."""

    prompts: list[list[Message]]
    """The prompt of each answer."""
    tokens: list[list[str]]
    """The tokens of each answer, its stop token (`STOP`) included if it has one."""
    rewards: list[list[float]]
    """The reward of each token: log(dpo / reference), in nats."""


@torch.no_grad()
def sample_rewarded_tokens(
    backbone: PolicyBackbone,
    prompts: Sequence[list[Message]],
    answers_per_prompt: int = 4,
    max_new_tokens: int = 36,
    seed: int = 1,
    role: str = "dpo",
) -> RewardedTokens:
    """Sample answers of the reference, and reward each of their tokens by log(role / reference).

    Answers with a special token other than the stop are left out: they cannot be read word by word.

    Args:
        backbone: holds the role and the role `reference`.
        prompts: P different prompts of the quickstart.
        answers_per_prompt: answers to each; the same as those of `evaluate_policy` with the same seed.
        max_new_tokens: length limit of an answer.
        seed: seed of the answers.
        role: who gives the rewards.
    """
    asked = list(prompts) * answers_per_prompt
    trajectory = Sampler(backbone, "reference", max_new_tokens, seed).trajectory(asked)
    readable = _without_special_tokens(trajectory, backbone.chat)
    sequences = trajectory.rows(readable).sequences
    logprobs, reference = (backbone.token_logprobs(name, sequences)[0] for name in (role, "reference"))
    rewards = token_rewards(logprobs, reference, sequences.response_mask, beta_1=1.0, clip=0.0)
    tokenizer = backbone.chat.tokenizer
    result = RewardedTokens([asked[row] for row in readable.tolist()], [], [])
    for ids, values, mask in zip(sequences.response_ids, rewards, sequences.response_mask, strict=True):
        result.tokens.append(list(tokenizer.convert_ids_to_tokens(ids[mask].tolist())))
        result.rewards.append(values[mask].tolist())
    return result


def _without_special_tokens(trajectory: Trajectory, chat: ChatTokenizer) -> Tensor:
    """Rows, (N,) int64, whose answers hold no special token but the stop."""
    special = torch.tensor([i for i in chat.tokenizer.all_special_ids if i not in chat.stop_ids])
    found = torch.isin(trajectory.sequences.response_ids, special) & trajectory.sequences.response_mask
    return (~found.any(-1)).nonzero().squeeze(-1)


def token_reward_correlation(
    backbone: PolicyBackbone,
    prompts: Sequence[list[Message]],
    answers_per_prompt: int = 4,
    max_new_tokens: int = 36,
    seed: int = 1,
    role: str = "dpo",
) -> float | None:
    """Spearman's rank correlation of learned token rewards with gold weights, on answers of the reference.

    Args:
        backbone: holds the role and the role `reference`.
        prompts: see `sample_rewarded_tokens`, as the other arguments.
        answers_per_prompt: answers to each prompt.
        max_new_tokens: length limit of an answer.
        seed: seed of the answers.
        role: who gives the rewards.

    Returns:
        The correlation over all tokens, or None where one side does not vary.
    """
    rewarded = sample_rewarded_tokens(backbone, prompts, answers_per_prompt, max_new_tokens, seed, role)
    return token_correlation(*rewarded, ranked=True)


def token_correlation(
    prompts: Sequence[Sequence[Message]],
    tokens: Sequence[Sequence[str]],
    rewards: Sequence[Sequence[float]],
    ranked: bool = False,
) -> float | None:
    """Correlation of token rewards with gold weights over all tokens of all responses.

    Args:
        prompts: N prompts.
        tokens: the tokens of each response, as in `token_reward_text`.
        rewards: their rewards.
        ranked: Spearman's correlation, of ranks, in the place of Pearson's.

    Returns:
        The correlation, or None where one side does not vary or there are fewer than three tokens.

    Raises:
        UserError: if there are not as many rewards as tokens.
    """
    ours: list[float] = []
    gold: list[float] = []
    for prompt, response, values in zip(prompts, tokens, rewards, strict=True):
        body = [token for token in response if token != STOP]
        weights = [weight for _, weight in gold_token_rewards(prompt, " ".join(body))]
        gold.extend(weights[: len(response)])
        ours.extend(values)
    if len(gold) != len(ours):
        raise UserError("The rewards and the responses differ in their numbers of tokens; give one for each token.")
    if ranked:
        ours, gold = (fractional_ranks(torch.tensor(values, dtype=torch.float64)).tolist() for values in (ours, gold))
    return _correlation(ours, gold)


def _correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    if len(a) < 3 or len(set(a)) == 1 or len(set(b)) == 1:
        return None
    return statistics.correlation(a, b)


def token_reward_text(
    prompt: Sequence[Message],
    tokens: Sequence[str],
    rewards: Sequence[float],
    bar_width: int = 10,
    name: str = "token reward",
) -> str:
    """Show token rewards beside the gold weights of the same tokens, one token a line.

    Both columns have bars to the left of the axis for negative and to the right for positive values, each
    column scaled to its own largest value: the two are not in the same units.

    Args:
        prompt: a prompt of the quickstart.
        tokens: T tokens of one response; a stop token is shown as `STOP`.
        rewards: T rewards, those which RTO gives to the tokens.
        bar_width: characters of the longest bar.
        name: heading of the rewards' column.

    Raises:
        UserError: if there are not as many rewards as tokens.
    """
    if len(tokens) != len(rewards):
        raise UserError(f"There are {len(rewards)} rewards for {len(tokens)} tokens; give one for each token.")
    body = [token for token in tokens if token != STOP]
    gold = [weight for _, weight in gold_token_rewards(prompt, " ".join(body))]
    if len(gold) - 1 != len(body):
        raise UserError("A token is not one word or mark of the quickstart; show tokens of its own tokenizer only.")
    if len(body) == len(tokens):
        # Cut off before its stop: there is no token to show the stop's weight beside.
        gold = gold[:-1]
    token_width = max([len("token"), *(len(token) for token in tokens)])
    column = 2 * bar_width + 9
    lines = [
        prompt[-1]["content"],
        f"{'token':<{token_width}}  {name:<{column}}  {'gold weight':<{column}}".rstrip(),
    ]
    reward_scale = max((abs(value) for value in rewards), default=0.0)
    gold_scale = max((abs(value) for value in gold), default=0.0)
    for token, reward, weight in zip(tokens, rewards, gold, strict=True):
        cells = [_bar(reward, reward_scale, bar_width), _bar(weight, gold_scale, bar_width)]
        lines.append(f"{token:<{token_width}}  {cells[0]:<{column}}  {cells[1]}".rstrip())
    total = f"{'sum':<{token_width}}  {sum(rewards):+7.3f}{'':{column - 7}}  {sum(gold):+7.3f}"
    lines.append(total)
    correlation = _correlation(rewards, gold)
    if correlation is not None:
        lines.append(f"correlation over these {len(tokens)} tokens: {correlation:.2f}")
    return "\n".join(lines)


def _bar(value: float, scale: float, width: int) -> str:
    length = round(width * abs(value) / scale) if scale > 0.0 else 0
    left = ("-" * length if value < 0.0 else "").rjust(width)
    right = ("+" * length if value > 0.0 else "").ljust(width)
    return f"{value:+7.3f} {left}|{right}"
