"""Models that answer or score, from where they were saved."""

from pathlib import Path

import pytest

from rto_lightning.errors import UserError
from rto_lightning.saved.models import is_whole_model, open_policy, open_reward_role
from tests.roles import save_random_role


def no_stage(config):
    raise AssertionError("a saved role needs no stage")


def test_what_answers_and_what_scores_are_told_apart(tiny_model, tmp_path):
    reward = save_random_role(tiny_model, tmp_path / "reward", "reward")
    with pytest.raises(UserError, match="scores answers and gives none; name a policy"):
        open_policy(reward, no_stage)
    assert open_reward_role(Path(reward), no_stage).name == "reward"
    policy = save_random_role(tiny_model, tmp_path / "policy", "policy")
    with pytest.raises(UserError, match="is the role policy, not reward; name another folder"):
        open_reward_role(Path(policy), no_stage)
    backbone, name = open_policy(policy, no_stage)
    assert name == "policy" and not any(weight.requires_grad for weight in backbone.parameters())


def test_a_role_is_no_whole_model(tiny_model, tmp_path):
    assert is_whole_model(str(tiny_model)) and is_whole_model("owner/name")
    assert not is_whole_model(save_random_role(tiny_model, tmp_path / "policy", "policy"))
    assert open_policy(str(tiny_model), no_stage)[1] == "reference"
