"""Reward sources: a role, an outside model, a Python function."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rto_lightning.errors import UserError
from rto_lightning.rewards import (
    FunctionReward,
    OutsideRewardModel,
    WeightedReward,
    make_reward_source,
    score_statistics,
)
from rto_lightning.rollout import Trajectory
from tests.models import make_backbone, write_tiny_classifier

PROMPTS = [[{"role": "user", "content": "Hi"}], [{"role": "user", "content": "Tell me more"}]]
TEXTS = ["Good day!", "No."]


def count_letters(prompts, responses):
    return [float(len(response)) for response in responses]


def too_few(prompts, responses):
    return [1.0]


def no_numbers(prompts, responses):
    return ["good", "bad"]


def one_argument(responses):
    return [0.0 for _ in responses]


def nothing(prompts, responses):
    return None


@pytest.fixture(scope="module")
def backbone(tiny_model):
    return make_backbone(tiny_model)


@pytest.fixture(scope="module")
def trajectory(backbone):
    chat = backbone.chat
    rows = [(chat.encode_prompt(p), chat.encode_response(t, 50)) for p, t in zip(PROMPTS, TEXTS, strict=True)]
    from rto_lightning.backbone import Sequences

    sequences = Sequences.from_lists([r[0] for r in rows], [r[1] for r in rows], chat.pad_id)
    return Trajectory(sequences, torch.tensor([False, False]))


def test_function_reads_text(backbone, trajectory):
    source = FunctionReward(f"{__name__}:count_letters", backbone.chat)
    assert source.score(PROMPTS, trajectory).tolist() == [9.0, 3.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_few", "1 scores for 2 responses"),
        ("no_numbers", "what is no list of numbers"),
        ("nothing", "what is no list of numbers"),
    ],
)
def test_function_with_a_wrong_answer_is_refused(backbone, trajectory, name, message):
    with pytest.raises(UserError, match=f"{name} returned {message}"):
        FunctionReward(f"{__name__}:{name}", backbone.chat).score(PROMPTS, trajectory)


def test_function_of_other_arguments_is_refused_before_it_is_called(backbone):
    with pytest.raises(UserError, match=r"one_argument does not take what it is called with, \(prompts, responses\)"):
        FunctionReward(f"{__name__}:one_argument", backbone.chat)


@pytest.mark.parametrize("path", ["no_colon", "no.such.module:f", "math:no_such_function", "math:pi"])
def test_function_that_is_none_is_refused(backbone, path):
    with pytest.raises(UserError, match=path.split(":")[0]):
        FunctionReward(path, backbone.chat)


def test_outside_model_scores_as_transformers_does(backbone, trajectory, tmp_path):
    folder = write_tiny_classifier(tmp_path / "rm")
    scores = OutsideRewardModel(str(folder), backbone.chat, torch.float64).score(PROMPTS, trajectory)
    plain = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
    for score, prompt, text in zip(scores, PROMPTS, TEXTS, strict=True):
        ids = backbone.chat.encode_prompt(prompt) + backbone.chat.encode_response(text, 50)
        with torch.no_grad():
            expected = plain(torch.tensor([ids])).logits.squeeze()
        torch.testing.assert_close(score.double(), expected, rtol=0, atol=1e-6)


def test_what_is_longer_than_an_outside_model_takes_is_refused(backbone, trajectory, tmp_path):
    model = OutsideRewardModel(str(write_tiny_classifier(tmp_path / "rm")), backbone.chat, torch.float32)
    model.context_length = 8
    with pytest.raises(UserError, match=r"tokens for the reward model .*rm, which takes 8; lower data.max_prompt"):
        model.score(PROMPTS, trajectory)


def test_source_is_chosen_by_what_the_folder_holds(tiny_model, tmp_path):
    backbone = make_backbone(tiny_model)
    backbone.add_role("policy", trainable=True, scalar_head=True)
    backbone.save_role("policy", tmp_path / "role", backbone.card("policy", "reward", {}))
    outside = write_tiny_classifier(tmp_path / "rm")
    role = make_reward_source(backbone, WeightedReward(str(tmp_path / "role")))
    assert role.name == f"the reward role {tmp_path / 'role'}"
    assert "reward" in backbone.roles
    assert make_reward_source(backbone, WeightedReward(str(outside))).name == str(outside)
    function = WeightedReward(reward_function=f"{__name__}:count_letters")
    assert make_reward_source(backbone, function).name.endswith("count_letters")
    service = make_reward_source(backbone, WeightedReward(reward_url=["http://a:1/x?key=y", "https://b"]))
    assert service.name == "the reward service http://a:1/x, https://b"


def test_score_statistics():
    mean, std = score_statistics(torch.tensor([1.0, 3.0]), "it").tolist()
    assert (mean, std) == (2.0, 1.0)
    with pytest.raises(UserError, match=r"the score 4\.0"):
        score_statistics(torch.tensor([4.0, 4.0]), "it")


def test_outside_model_scores_truncated_answers_without_a_stop(backbone, trajectory, tmp_path):
    folder = write_tiny_classifier(tmp_path / "rm")
    source = OutsideRewardModel(str(folder), backbone.chat, torch.float64)
    seen = []
    source.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    source.score(PROMPTS, Trajectory(trajectory.sequences, torch.tensor([True, False])))
    rows = [
        ids[mask.bool()].tolist() for ids, mask in zip(seen[0]["input_ids"], seen[0]["attention_mask"], strict=True)
    ]
    assert rows[0][-1] not in backbone.chat.stop_ids
    assert rows[1][-1] in backbone.chat.stop_ids
