"""The scores of the RTO stage: penalties, several sources, their statistics, and the critic that starts from one."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from rto_lightning.backbone import PolicyBackbone, RoleCard, Sequences
from rto_lightning.errors import UserError
from rto_lightning.modules.rto_settings import CriticSettings, RewardSettings
from rto_lightning.rewards import WeightedReward
from rto_lightning.rollout import Trajectory
from tests.models import some_sequences
from tests.modules import stages

FLOAT64 = {"dtype": "float64"}


def test_short_responses_pay(tiny_model, files):
    rewards = RewardSettings(beta_1=0.0, beta_3=0.0, min_response_tokens=6, short_penalty=2.0)
    module = stages.rto(tiny_model, rewards=rewards, reward_function=None)
    batch = stages.one_batch(module, files)
    sequences = module.rollout(batch, 0).sequences
    mask = torch.arange(6) < torch.tensor([1, 6, 5, 6])[:, None]
    responses = torch.nn.functional.pad(sequences.input_ids, (0, 6 - sequences.response_width), value=70)
    attention = torch.cat([sequences.attention_mask[:, : sequences.prompt_width], mask.long()], dim=1)
    trajectory = Trajectory(Sequences(responses, attention, mask), torch.zeros(4, dtype=torch.bool))
    terms = module.make_experience(trajectory, batch.messages).terms
    assert terms.score.sum(1).tolist() == [-2.0, 0.0, -2.0, 0.0]


def test_sources_are_normalised_weighted_and_added(tiny_model, roles, files, tmp_path):
    more = [
        WeightedReward(reward_function="tests.modules.stages:count_exclamations", weight=0.5),
        WeightedReward(reward=roles["adapters", "reward"], weight=-2.0),
    ]
    module = stages.full_rto(tiny_model, roles, more_rewards=more, rewards=RewardSettings(score_clip=0.0, beta_1=0.0))
    experience = stages.experience(module, files)
    assert experience.scores.shape == (4, 3)
    torch.testing.assert_close(experience.scores[:, 0], experience.scores[:, 2])
    statistics = torch.tensor([module.scores.normalizer(number).mean_std.tolist() for number in range(3)])
    card = RoleCard.read(Path(roles["adapters", "reward"]))
    assert statistics[0].tolist() == statistics[2].tolist() == pytest.approx([card.score_mean, card.score_std])
    normalized = (experience.scores - statistics[:, 0]) / statistics[:, 1]
    expected = normalized @ torch.tensor([1.0, 0.5, -2.0])
    torch.testing.assert_close(experience.terms.score.sum(1), expected, rtol=1e-4, atol=1e-4)
    metrics = stages.recorded_fit(module, files, tmp_path, steps=1)[0]
    assert {"train/score", "train/score_2", "train/score_3"} <= set(metrics)


def test_statistics_go_to_sources_of_the_same_name_only(tiny_model, files, tmp_path):
    more = [WeightedReward(reward_function="tests.modules.test_rto_scores:count_letters")]
    module = stages.fit(stages.rto(tiny_model, more_rewards=more), stages.prompts(files), tmp_path, steps=1)
    module.save_role(tmp_path / "role")
    options = {"trained": str(tmp_path / "role"), "reward_function": more[0].reward_function}
    again = stages.rto(tiny_model, **options)
    again.configure_model()
    assert torch.equal(again.scores.normalizer().mean_std, module.scores.normalizer(1).mean_std)
    other = stages.rto(tiny_model, **{**options, "reward_function": "tests.modules.test_rto_scores:count_words"})
    other.configure_model()
    assert not other.scores.ready


def count_letters(prompts, responses):
    return [float(len(response)) for response in responses]


def count_words(prompts, responses):
    return [float(len(response.split())) for response in responses]


def test_statistics_come_from_the_checkpoint(tiny_model, files, tmp_path):
    module = stages.rto(tiny_model)
    module.configure_model()
    module.scores.normalizer().set(7.0, 3.0)
    stages.fit(module, stages.prompts(files), tmp_path, 1, enable_checkpointing=True, callbacks=[
        ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    ])  # fmt: skip
    resumed = stages.rto(tiny_model)
    stages.trainer(tmp_path, 2).fit(resumed, stages.prompts(files), ckpt_path=tmp_path / "step=1.ckpt")
    assert resumed.scores.normalizer().mean_std.tolist() == [7.0, 3.0]


@pytest.mark.parametrize("init", ["reward", "folder"])
@pytest.mark.parametrize("normalize", [True, False])
def test_critic_starts_in_units_of_the_reward(tiny_model, roles, init, normalize):
    folder = roles["adapters", "reward"]
    options = {} if init == "reward" else {"reward": None, "reward_function": "tests.modules.stages:count_exclamations"}
    module = stages.full_rto(
        tiny_model, roles, backbone=FLOAT64, critic=CriticSettings(init="reward" if init == "reward" else folder),
        rewards=RewardSettings(beta_3=0.1, normalize_score=normalize), **options,
    )  # fmt: skip
    module.configure_model()
    if init == "folder" and normalize:
        module.scores.normalizer().set(-100.0, 50.0)  # the function's are not the role's
    sequences = some_sequences()
    plain = PolicyBackbone(module.settings, module.chat)
    plain.add_role("reward", folder, scalar_head=True)
    with torch.no_grad():
        scores, values = (
            plain.sequence_scores("reward", sequences),
            module.backbone.sequence_scores("critic", sequences),
        )
    card = RoleCard.read(Path(folder))
    mean, std = (card.score_mean, card.score_std) if normalize else (0.0, 1.0)
    torch.testing.assert_close(values, 0.1 * (scores - mean) / std, rtol=1e-5, atol=1e-6)


def test_a_source_needs_one_name():
    for options in ({}, {"reward": "a", "reward_function": "b:c"}):
        with pytest.raises(UserError, match="set either reward or reward_function"):
            WeightedReward(**options)
