"""What options of the RTO stage change: estimators, granularities, losses; and which are refused."""

import pytest
import torch

from rto_lightning.algorithms import GROUP_ESTIMATORS, masked_mean, masked_sum
from rto_lightning.backbone import Sequences
from rto_lightning.errors import UserError
from rto_lightning.modules.ppo_gradients import accumulate_policy_gradients, accumulate_value_gradients
from rto_lightning.modules.ppo_update import ppo_update
from rto_lightning.modules.rto_settings import CriticSettings, PPOSettings, RewardSettings
from rto_lightning.rewards import WeightedReward
from rto_lightning.rollout import RolloutSettings, Trajectory
from tests.models import randomize
from tests.modules import stages

WITHOUT_CRITIC = ["reinforce++", "rloo", "grpo"]
FLOAT64 = {"dtype": "float64"}


def rollout_of(estimator):
    return RolloutSettings(max_new_tokens=6, responses_per_prompt=2 if estimator in GROUP_ESTIMATORS else 1)


# Estimators ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", WITHOUT_CRITIC)
@pytest.mark.parametrize("dense", [True, False], ids=["token rewards", "score alone"])
def test_estimators_without_critic_build_none_and_train(tiny_model, roles, files, tmp_path, estimator, dense):
    module = stages.full_rto(
        tiny_model,
        roles,
        rewards=RewardSettings(beta_1=0.05 if dense else 0.0),
        rollout=rollout_of(estimator),
        ppo=PPOSettings(estimator=estimator, epochs=2, minibatch_size=4, microbatch_size=2),
    )
    trainer = stages.trainer(tmp_path, 3)
    module.configure_model()
    assert "critic" not in module.backbone.roles
    before = [p.clone() for p in module.backbone.trained_parameters("policy")]
    trainer.fit(module, stages.prompts(files))
    assert trainer.global_step == 3  # iterations, without a critic's steps to count them
    assert len(trainer.optimizers) == 1
    after = module.backbone.trained_parameters("policy")
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("estimator", WITHOUT_CRITIC)
def test_token_rewards_reach_the_advantages_of_every_estimator(tiny_model, roles, files, estimator):
    advantages = []
    for beta_1 in (0.0, 0.5):
        module = stages.full_rto(
            tiny_model,
            roles,
            rewards=RewardSettings(beta_1=beta_1, token_reward_clip=0.0),
            rollout=rollout_of(estimator),
            ppo=PPOSettings(estimator=estimator),
        )
        experience = stages.experience(module, files)
        assert experience.values is None
        advantages.append(experience.advantages)
    spread = [masked_sum((a - a[:, :1]).abs(), experience.mask).item() for a in advantages]
    assert spread[1] > spread[0]  # they tell the tokens of a response apart
    if estimator != "reinforce++":
        assert spread[0] == pytest.approx(0, abs=1e-5)  # a score alone does not (KL is 0 at first)


@pytest.mark.parametrize("sampled_at_a_time", [None, 5])
def test_responses_of_a_group_differ_and_stand_together(tiny_model, files, sampled_at_a_time):
    rollout = RolloutSettings(max_new_tokens=6, responses_per_prompt=3, batch_size=sampled_at_a_time)
    module = stages.rto(tiny_model, rollout=rollout)
    batch = stages.one_batch(module, files).repeated(3)
    sequences = module.rollout(batch, 0).sequences
    prompts = sequences.input_ids[:, : sequences.prompt_width].unflatten(0, (4, 3))
    assert (prompts == prompts[:, :1]).all()
    assert not torch.equal(prompts[0], prompts[1])
    answers = sequences.response_ids.unflatten(0, (4, 3))
    assert all(not torch.equal(answers[i, 0], answers[i, j]) for i in range(4) for j in (1, 2))
    assert [messages[0]["content"] for messages in batch.messages[:4]] == [batch.messages[0][0]["content"]] * 3 + [
        batch.messages[3][0]["content"]
    ]


def test_group_advantages_sum_to_zero_over_a_prompt(tiny_model, files):
    ppo = PPOSettings(estimator="rloo")
    rollout = RolloutSettings(max_new_tokens=6, responses_per_prompt=2)
    experience = stages.experience(
        stages.rto(tiny_model, rollout=rollout, ppo=ppo, rewards=RewardSettings(beta_1=0.0)), files
    )
    first = experience.advantages[:, 0].unflatten(0, (4, 2))
    torch.testing.assert_close(first.sum(1), torch.zeros(4), rtol=0, atol=1e-5)
    assert (first != 0).any()


@pytest.mark.parametrize("estimator", sorted(GROUP_ESTIMATORS))
def test_a_group_of_one_is_refused(tiny_model, files, tmp_path, estimator):
    module = stages.rto(tiny_model, ppo=PPOSettings(estimator=estimator))
    with pytest.raises(UserError, match=r"set rollout.responses_per_prompt to 2 or more"):
        stages.fit(module, stages.prompts(files), tmp_path)


@pytest.mark.parametrize(
    ("chosen", "estimator", "whitened"),
    [
        (None, "gae", True),
        (None, "reinforce++", True),
        (None, "rloo", False),
        (False, "gae", False),
        (True, "rloo", True),
    ],
)
def test_whitening_follows_the_estimator_or_the_setting(tiny_model, files, chosen, estimator, whitened):
    module = stages.rto(
        tiny_model, rollout=rollout_of(estimator), ppo=PPOSettings(estimator=estimator, whiten_advantages=chosen)
    )
    experience = stages.experience(module, files)
    variance = masked_mean(experience.advantages.square(), experience.mask)
    assert (variance.item() == pytest.approx(1, abs=1e-4)) is whitened


# Granularity --------------------------------------------------------------------------------------------------


def test_granularities_put_the_same_rewards_elsewhere(tiny_model, roles, files):
    terms, scores = {}, {}
    for granularity in ("token", "sentence", "delayed", "shaping"):
        rewards = RewardSettings(beta_1=0.5, token_reward_clip=0.3, granularity=granularity)
        experience = stages.experience(stages.full_rto(tiny_model, roles, backbone=FLOAT64, rewards=rewards), files)
        terms[granularity], scores[granularity] = experience.terms.token, experience.terms.score
        mask, lengths = experience.mask, experience.trajectory.sequences.response_lengths
    sums = {name: masked_sum(term, mask, dim=1) for name, term in terms.items()}
    for name in ("sentence", "delayed"):
        torch.testing.assert_close(sums[name], sums["token"], rtol=0, atol=1e-12)
        assert not torch.equal(terms[name], terms["token"])
    last = torch.arange(mask.shape[1]) == lengths[:, None] - 1
    assert not terms["delayed"][~last].any() and terms["token"][~last].any()
    torch.testing.assert_close(sums["shaping"], torch.zeros_like(sums["shaping"]), rtol=0, atol=1e-12)
    assert torch.equal(terms["shaping"][~last], terms["token"][~last])
    assert all(torch.equal(score, scores["token"]) for score in scores.values())


def test_sentences_end_where_the_text_says(tiny_model, roles):
    """Tokens of single bytes: the sum of "yes!" stands on its mark, that of "no." on the dot, the tail on the stop."""
    module = stages.full_rto(
        tiny_model, roles, backbone=FLOAT64, rewards=RewardSettings(granularity="sentence", beta_3=0.0),
        critic=CriticSettings(init="policy"),
    )  # fmt: skip
    module.configure_model()
    prompt = [{"role": "user", "content": "Question?"}]
    response = module.chat.encode_response("yes! no. 3.1", 20)
    sequences = Sequences.from_lists([module.chat.encode_prompt(prompt)], [response], module.chat.pad_id)
    trajectory = Trajectory(sequences, torch.tensor([False]))
    [placed] = module.make_experience(trajectory, [prompt]).terms.token
    assert placed.nonzero().squeeze(1).tolist() == [3, 7, len(response) - 1]


def test_shaping_with_a_discount_is_refused(tiny_model, roles):
    with pytest.raises(UserError, match=r"gamma is 0.9; set it to 1"):
        stages.full_rto(
            tiny_model, roles, rewards=RewardSettings(granularity="shaping"), ppo=PPOSettings(gamma=0.9)
        )  # fmt: skip


# Losses -------------------------------------------------------------------------------------------------------


def policy_gradient(module, experience, **ppo):
    """The gradient of one minibatch of all samples, as one vector, and the metrics."""
    module.zero_grad()
    settings = PPOSettings(**{"microbatch_size": 3, **ppo})
    metrics = accumulate_policy_gradients(
        module.backbone, experience, torch.arange(4), settings, 1.0, lambda loss: loss.backward()
    )
    gradients = [p.grad for p in module.backbone.trained_parameters("policy")]
    return torch.cat([g.flatten() for g in gradients if g is not None]), metrics


@pytest.fixture
def experience_float64(tiny_model, files):
    module = stages.rto(tiny_model, backbone=FLOAT64)
    module.configure_model()
    randomize(module.backbone.trained_parameters("policy"))
    return module, stages.experience(module, files)


def changed(experience, **fields):
    return type(experience)(**{**vars(experience), **fields})


def test_dual_clip_cuts_what_a_large_ratio_does_to_a_bad_token(experience_float64):
    module, experience = experience_float64
    bad = changed(experience, logprobs=experience.logprobs - 2, advantages=-torch.ones_like(experience.logprobs))
    unbounded, _ = policy_gradient(module, bad)
    bounded, metrics = policy_gradient(module, bad, dual_clip=3.0)
    assert unbounded.abs().sum() > 0
    assert not bounded.any()  # ratios are e^2 > 3
    assert metrics["policy/clip_fraction"] == 1
    torch.testing.assert_close(metrics["policy/loss"], torch.tensor(3.0), rtol=1e-6, atol=0)
    untouched, _ = policy_gradient(module, bad, dual_clip=10.0)
    assert torch.equal(untouched, unbounded)


def test_entropy_bonus_adds_the_gradient_of_the_entropy(experience_float64):
    module, experience = experience_float64
    plain, _ = policy_gradient(module, experience)
    with_bonus, _ = policy_gradient(module, experience, entropy_coefficient=0.25)
    module.zero_grad()
    sequences = experience.trajectory.sequences
    _, entropy = module.backbone.token_logprobs("policy", sequences, with_entropy=True)
    masked_mean(entropy, experience.mask, dim=1).mean().backward()
    gradients = [p.grad for p in module.backbone.trained_parameters("policy")]
    expected = torch.cat([g.flatten() for g in gradients if g is not None])
    assert expected.abs().max() > 1e-2
    # Llama's norm computes in float32 whatever the model's type is.
    torch.testing.assert_close(with_bonus - plain, -0.25 * expected, rtol=0, atol=1e-6)


def test_entropy_bonus_raises_the_entropy(tiny_model, files, tmp_path):
    entropies = []
    for coefficient in (0.0, 5.0):
        torch.manual_seed(0)
        module = stages.rto(tiny_model, ppo=PPOSettings(entropy_coefficient=coefficient), seed=1)
        entropies.append(stages.recorded_fit(module, files, tmp_path, steps=4)[-1]["train/entropy"])
    assert entropies[1] > entropies[0]


def test_aggregations_weigh_responses_of_different_lengths_differently(experience_float64):
    module, experience = experience_float64
    lengths = torch.tensor([1, 6, 2, 6])
    sequences = experience.trajectory.sequences
    mask = torch.arange(sequences.response_width) < lengths[:, None]
    shortened = Sequences(sequences.input_ids, sequences.attention_mask, mask)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)[:, None].expand(mask.shape)
    experience = changed(
        experience, trajectory=Trajectory(shortened, experience.trajectory.truncated), advantages=advantages
    )
    _, by_sequence = policy_gradient(module, experience)
    _, by_token = policy_gradient(module, experience, aggregation="token")
    assert by_sequence["policy/loss"].item() == pytest.approx(0, abs=1e-6)
    assert by_token["policy/loss"].item() == pytest.approx(-(1 + 2 - 6 - 6) / 15, abs=1e-6)


def test_value_clipping_stops_values_that_moved_too_far(experience_float64):
    """Old values of 1 below, and returns another 0.5 up: what moved reached its target already, clipped it did not."""
    module, experience = experience_float64
    moved = changed(experience, values=experience.values - 1, returns=experience.values + 0.5)
    fractions, losses = {}, {}
    for clip in (None, 0.2, 5.0):
        metrics = accumulate_value_gradients(
            module.backbone, moved, torch.arange(4), PPOSettings(value_clip_range=clip), lambda loss: loss.backward()
        )
        fractions[clip], losses[clip] = metrics["critic/clip_fraction"].item(), metrics["critic/loss"].item()
    assert fractions == {None: 0.0, 0.2: 1.0, 5.0: 0.0}
    assert losses[None] == losses[5.0] == pytest.approx(0.5 * 0.5**2)
    assert losses[0.2] == pytest.approx(0.5 * 1.3**2)


class CountingOptimizer:
    """Stands for Lightning's wrapper, whose steps count as iterations."""

    def __init__(self, parameters):
        self.optimizer, self.steps = torch.optim.SGD(parameters, lr=0.1), 0

    def step(self):
        self.steps += 1
        self.optimizer.step()

    def zero_grad(self, set_to_none):
        self.optimizer.zero_grad(set_to_none)


@pytest.mark.parametrize("estimator", ["gae", "reinforce++"])
def test_kl_stop_ends_the_policys_updates_and_the_critic_goes_on(tiny_model, files, estimator):
    """The ratio is 1 at the first minibatch, and no longer after its step."""
    weights, counted, metrics = {}, {}, {}
    for name, kl_stop, minibatches in (("stopped", 1e-9, 3), ("first", None, 1), ("whole", None, 3)):
        torch.manual_seed(0)
        ppo = PPOSettings(estimator=estimator, kl_stop=kl_stop)
        module = stages.rto(tiny_model, backbone=FLOAT64, ppo=ppo, seed=1)
        experience = stages.experience(module, files)
        optimizers = {
            role: CountingOptimizer(module.backbone.trained_parameters(role))
            for role in ("policy", "critic")
            if role in module.backbone.roles
        }
        rows = [torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([0, 3])][:minibatches]
        metrics[name] = ppo_update(
            module.backbone, experience, rows, ppo, 1.0, lambda loss: loss.backward(),
            optimizers["policy"], optimizers.get("critic"), lambda *step: True,
        )  # fmt: skip
        weights[name] = {role: module.backbone.trained_parameters(role) for role in optimizers}
        counted[name] = sum(optimizer.steps for optimizer in optimizers.values())
    assert counted == {"stopped": 1, "first": 1, "whole": 1}
    assert [metrics[name]["policy/optimizer_steps"].item() for name in metrics] == [1, 1, 3]

    def equal(role, one, other):
        return all(torch.equal(a, b) for a, b in zip(weights[one][role], weights[other][role], strict=True))

    assert equal("policy", "stopped", "first") and not equal("policy", "stopped", "whole")
    assert all(weight.grad is None for weight in weights["stopped"]["policy"])
    if estimator == "gae":
        assert equal("critic", "stopped", "whole") and not equal("critic", "stopped", "first")


def test_held_out_prompts_need_no_critic(tiny_model, roles, files, tmp_path):
    module = stages.full_rto(tiny_model, roles, rollout=RolloutSettings(max_new_tokens=6, responses_per_prompt=4))
    [metrics] = stages.trainer(tmp_path, 0).test(module, stages.prompts(files), verbose=False)
    single = stages.full_rto(tiny_model, roles)
    assert [metrics] == stages.trainer(tmp_path, 0).test(
        single, stages.prompts(files), verbose=False
    )  # one answer each
    assert set(module.backbone.roles) == {"reference", "policy", "dpo", "reward"}
    assert not any("critic" in name for name in metrics)


def test_one_module_predicts_then_tests_then_trains(tiny_model, roles, files, tmp_path):
    """As in a notebook: each task adds the roles that it needs."""
    module = stages.full_rto(tiny_model, roles, ema_decay=0.5)
    data = stages.prompts(files)
    stages.trainer(tmp_path, 0).predict(module, data)
    stages.trainer(tmp_path, 0).test(module, data, verbose=False)
    stages.fit(module, data, tmp_path, steps=2)
    stages.fit(module, data, tmp_path, steps=2)
    whole = stages.full_rto(tiny_model, roles, ema_decay=0.5)
    whole.configure_model()
    assert set(module.backbone.roles) == set(whole.backbone.roles)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rewards": RewardSettings(beta_1=0.0, granularity="delayed")},
            "moves token rewards, of which beta_1 0 leaves",
        ),
        ({"critic": CriticSettings(warmup_iterations=2), "ppo": PPOSettings(estimator="reinforce++")}, "has none"),
        ({"rewards": RewardSettings(beta_1=0.0, min_response_tokens=9, short_penalty=1.0)}, "is above rollout"),
        ({"rewards": RewardSettings(beta_1=0.0, beta_3=0.0)}, "both 0, so that nothing is rewarded"),
        ({"rewards": RewardSettings(beta_1=0.0, beta_3=0.0), "more_rewards": [WeightedReward("x")]}, "beta_3 0 leaves"),
    ],
)
def test_options_that_do_nothing_together_are_refused(tiny_model, options, message):
    with pytest.raises(UserError, match=message):
        stages.rto(tiny_model, **options)
