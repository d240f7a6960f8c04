"""Scores of texts, and what has none."""

import math

import pytest
import torch

from rto_lightning.backbone.loading import load_chat_tokenizer_from
from rto_lightning.errors import UserError
from rto_lightning.evaluation.scorers import function_scorer, outside_scorer, role_scorer
from rto_lightning.rewards import OutsideRewardModel
from rto_lightning.rewards.remote import ServedRole
from tests.models import make_backbone, write_tiny_classifier
from tests.roles import save_random_role

PROMPT = [{"role": "user", "content": "Why?"}]
TEXTS = ["So.", "x" * 300, "Because it is."]
"""The second has no place in 256 tokens."""


def none(prompts, responses):
    """A reward function that forgets to return."""


def words(prompts, responses):
    return ["good"] * len(responses)


def too_few(prompts, responses):
    return [1.0]


def test_a_role_has_no_score_of_what_is_too_long(tiny_model, tmp_path):
    backbone = make_backbone(tiny_model, dtype="float32")
    role = save_random_role(tiny_model, tmp_path / "reward", "reward")
    backbone.add_role("reward", role, scalar_head=True)
    score = role_scorer(ServedRole(backbone, "reward", batch_size=1))
    scores = score([PROMPT] * 3, TEXTS)
    assert [math.isnan(value) for value in scores] == [False, True, False]
    assert [scores[0], scores[2]] == pytest.approx([*score([PROMPT], TEXTS[:1]), *score([PROMPT], TEXTS[2:])], abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_outside_model_has_no_score_of_what_is_too_long(tmp_path, batch_size):
    folder = write_tiny_classifier(tmp_path / "outside")
    chat = load_chat_tokenizer_from(str(folder))
    score = outside_scorer(OutsideRewardModel(str(folder), chat, torch.float32), batch_size)
    scores = score([PROMPT] * 3, TEXTS)
    assert [math.isnan(value) for value in scores] == [False, True, False]
    assert [scores[0], scores[2]] == pytest.approx([*score([PROMPT], TEXTS[:1]), *score([PROMPT], TEXTS[2:])], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [("none", "no list of numbers"), ("words", "no list of numbers"), ("too_few", "1 scores for 3 responses")],
)
def test_a_function_has_to_give_a_number_each(name, message):
    with pytest.raises(UserError, match=message):
        function_scorer(f"tests.evaluation.test_scorers:{name}")([PROMPT] * 3, TEXTS)
