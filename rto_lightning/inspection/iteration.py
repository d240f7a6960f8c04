"""One RTO iteration, token by token: what each term of the reward gives, and what the critic makes of it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from rto_lightning.backbone import ChatTokenizer
from rto_lightning.inspection.pieces import token_texts
from rto_lightning.modules.experience import Experience


@dataclass(frozen=True)
class TokenTerms:
    """A token of a response, in units of the reward."""

    text: str
    """What it adds to the response, without blanks around it; a special token stands by its name."""
    token: float
    """Token reward, beta_1 * log(dpo / reference), clipped and moved as the run does."""
    kl: float
    """KL penalty, -beta_2 * log(policy / reference)."""
    score: float
    """Score of the response, on its last token."""
    value: float | None
    """What the critic expects from this token on; None without a critic."""
    goal: float
    """What the critic is trained towards, or the return to go without one."""
    advantage: float
    """As the policy loss uses it: over the whole iteration of mean 0 and deviation 1, if it is whitened."""

    @property
    def reward(self) -> float:
        """The sum of the three terms."""
        return self.token + self.kl + self.score


def token_terms(experience: Experience, row: int, chat: ChatTokenizer) -> list[TokenTerms]:
    """What an iteration knows of each token of one response.

    Args:
        experience: what `RTOModule.score` returned.
        row: the response.
        chat: the tokenizer of the run.

    Returns:
        A record for each of its tokens, the stop id included if it was sampled.
    """
    mask = experience.mask[row]
    ids: list[int] = experience.trajectory.sequences.response_ids[row][mask].tolist()
    texts, _ = token_texts(chat.tokenizer, ids)
    terms, values = experience.terms, experience.values
    columns = [
        table[row][mask].tolist()
        for table in (terms.token, terms.kl, terms.score, experience.returns, experience.advantages)
    ]
    expected = [None] * len(ids) if values is None else values[row][mask].tolist()
    return [
        TokenTerms(_shown(text), token, kl, score, value, goal, advantage)
        for text, token, kl, score, goal, advantage, value in zip(texts, *columns, expected, strict=True)
    ]


def token_terms_text(tokens: Sequence[TokenTerms]) -> str:
    """The records as an aligned table of plain text, with the sums of the reward and of its terms at its end."""
    heading = ["token", "token reward", "KL penalty", "score", "reward", "value", "goal", "advantage"]
    rows = [
        [
            token.text,
            *(f"{term:+.3f}" if term else "" for term in (token.token, token.kl, token.score)),
            f"{token.reward:+.3f}",
            "" if token.value is None else f"{token.value:+.3f}",
            f"{token.goal:+.3f}",
            f"{token.advantage:+.3f}",
        ]
        for token in tokens
    ]
    sums = (sum(getattr(token, name) for token in tokens) for name in ("token", "kl", "score", "reward"))
    rows.append(["sum", *(f"{value:+.3f}" for value in sums), "", "", ""])
    widths = [max(len(line[column]) for line in [heading, *rows]) for column in range(len(heading))]
    lines = (
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in [heading, *rows]
    )
    return "\n".join(line.rstrip() for line in lines)


def _shown(text: str) -> str:
    """A token's text without blanks around it; one of blanks alone is quoted, so that it can be seen."""
    return text.strip() or json.dumps(text)
