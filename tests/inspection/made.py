"""Rewarded responses made by hand."""

from collections.abc import Sequence

from rto_lightning.inspection import RewardedPair, RewardedResponse

STOP = "<|im_end|>"


def question(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def rewarded(
    texts: Sequence[str], rewards: Sequence[float], prompt: str = "Why?", score: float | None = None
) -> RewardedResponse:
    """A response of these tokens, of which those spelled as the stop are special."""
    special = [text == STOP for text in texts]
    ends = [text.strip().endswith((".", "!")) for text in texts]
    response = "".join(text for text in texts if text != STOP)
    ids = [sum(map(ord, text)) for text in texts]
    return RewardedResponse(question(prompt), response, ids, list(texts), special, list(rewards), ends, score)


def pair(prompt: str = "Why?", score: float | None = None) -> RewardedPair:
    """Two responses that part after two tokens."""
    return RewardedPair(
        rewarded(["It", " is", " good", ".", STOP], [0.1, -0.1, 0.8, 0.0, 0.2], prompt, score),
        rewarded(["It", " is", " bad", STOP], [0.1, -0.1, -1.5, 0.3], prompt, None if score is None else -score),
    )
