"""The terms of an iteration beside the tokens they belong to."""

from dataclasses import replace

import pytest
import torch

from rto_lightning.algorithms import RewardTerms
from rto_lightning.backbone import ChatTokenizer, Sequences
from rto_lightning.inspection import token_terms, token_terms_text
from rto_lightning.modules.experience import Experience
from rto_lightning.rollout import Trajectory
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def chat() -> ChatTokenizer:
    return ChatTokenizer(tiny_tokenizer(), [2], None, "tiny")


@pytest.fixture
def experience(chat) -> Experience:
    """Two responses, of which the second is `a`, a blank and the stop."""
    a, blank = chat.tokenizer.encode("a ", add_special_tokens=False)
    sequences = Sequences.from_lists([[1, 5], [1]], [[a, 2], [a, blank, 2]], chat.pad_id)
    table = torch.arange(6.0).reshape(2, 3).masked_fill(~sequences.response_mask, 0.0)
    last = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, -1.5]])
    return Experience(
        trajectory=Trajectory(sequences, torch.tensor([False, False])),
        logprobs=table,
        entropy=table,
        kl=table,
        scores=None,
        terms=RewardTerms(0.1 * table, -0.01 * table, last),
        values=10 * table,
        advantages=1 - table,
        returns=20 * table,
    )


def test_each_token_has_its_own_terms(experience, chat) -> None:
    first, blank, stop = token_terms(experience, 1, chat)
    assert [token.text for token in (first, blank, stop)] == ["a", '" "', "<|im_end|>"]
    assert (first.token, first.kl, first.score) == pytest.approx((0.3, -0.03, 0.0))
    assert (stop.token, stop.kl, stop.score, stop.reward) == pytest.approx((0.5, -0.05, -1.5, -1.05))
    assert (blank.value, blank.goal, blank.advantage) == (40.0, 80.0, -3.0)
    assert len(token_terms(experience, 0, chat)) == 2  # without padding


def test_the_table_is_aligned_and_ends_with_the_sums(experience, chat) -> None:
    lines = token_terms_text(token_terms(experience, 1, chat)).splitlines()
    assert lines[0].split("  ")[0] == "token" and lines[0].endswith("advantage")
    assert len({len(line) for line in lines[:-1]}) == 1
    assert lines[1].split() == ["a", "+0.300", "-0.030", "+0.270", "+30.000", "+60.000", "-2.000"]  # no score
    assert lines[-1].split() == ["sum", "+1.200", "-0.120", "-1.500", "-0.420"]


def test_without_a_critic_there_are_no_values(experience, chat) -> None:
    tokens = token_terms(replace(experience, values=None), 1, chat)
    assert [token.value for token in tokens] == [None] * 3
    assert "30.000" not in token_terms_text(tokens)
