"""The quickstart's own stages: preferences sampled from a model, and the report on four policies."""

from pathlib import Path

import matplotlib.colors
import matplotlib.image
import numpy
import pytest
import torch
from lightning.pytorch import Callback

from rto_lightning.backbone import PolicyBackbone
from rto_lightning.cli.run_files import with_default_loggers
from rto_lightning.data import DemonstrationDataModule, PromptDataModule
from rto_lightning.errors import UserError
from rto_lightning.modules.rto_settings import RewardSettings
from rto_lightning.quickstart.curves import read_curve
from rto_lightning.quickstart.gold import GoldName, gold_reward
from rto_lightning.quickstart.jsonl import read_jsonl, write_jsonl
from rto_lightning.quickstart.model import TinyModelSettings
from rto_lightning.quickstart.policies import Sampler, evaluate_policy, load_policies
from rto_lightning.quickstart.stages import GoldReward, compare, make_preferences, report
from rto_lightning.quickstart.token_rewards import sample_rewarded_tokens, token_correlation, token_reward_correlation
from rto_lightning.quickstart.world import write_world
from rto_lightning.rollout import response_texts
from tests.modules import stages
from tests.quickstart.report_table import read_table
from tests.roles import save_random_role

ITERATIONS = 3
TOKENS = 8
"""Length limit of answers."""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A model that has just learned to use words only, a file of twenty prompts and one of five others."""
    folder = tmp_path_factory.mktemp("world")
    size = TinyModelSettings(16, 32, layers=1, heads=2)
    write_world(folder / "written", train_reviews=800, validation_reviews=1, model=size)
    demonstrations = str(folder / "written/demonstrations_train.jsonl")
    data = DemonstrationDataModule(train=demonstrations, max_prompt_tokens=32, batch_size=32)
    sft = stages.fit(stages.sft(folder / "written/model", mode="full"), data, folder, steps=120)
    sft.save_role(folder / "model")
    prompts = read_jsonl(folder / "written/prompts_train.jsonl")
    write_jsonl(folder / "prompts.jsonl", prompts[:20])
    write_jsonl(folder / "held_out.jsonl", prompts[20:25])
    return folder


@pytest.fixture(scope="module")
def policies(world, tmp_path_factory) -> tuple[Path, dict[str, list[dict[str, float]]]]:
    """Folders `dpo`, `ppo` and `rto` as their stages leave them, and what the latter two logged at each iteration."""
    folder = tmp_path_factory.mktemp("policies")
    torch.manual_seed(0)  # of fresh adapters
    dpo = save_random_role(world / "model", folder / "dpo/role", "dpo")
    truth = {}
    for name, beta_1 in (("ppo", 0.0), ("rto", 0.5)):
        module = stages.rto(
            world / "model",
            dpo=dpo if beta_1 else None,
            rollout=stages.RolloutSettings(max_new_tokens=TOKENS),
            rewards=RewardSettings(beta_1=beta_1, normalization_samples=8),
        )
        prompts = str(world / "prompts.jsonl")
        data = PromptDataModule(train=prompts, validation=prompts, max_prompt_tokens=32, batch_size=4)
        callback = GoldReward("requirement") if beta_1 else GoldReward()
        truth[name] = Measure("requirement" if beta_1 else "sum")
        options = {"logger": with_default_loggers([], folder / name, "fit"), "callbacks": [callback, truth[name]]}
        stages.fit(module, data, folder / name, ITERATIONS, log_every_n_steps=1, val_check_interval=1, **options)
        module.save_role(folder / name / "role")
    return folder, {name: measure.iterations for name, measure in truth.items()}


class Measure(Callback):
    """Keeps what `read_curve` should find, the gold reward by a computation of its own."""

    def __init__(self, gold: GoldName) -> None:
        self.gold = gold
        self.iterations: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        trajectory, prompts = pl_module.last_rollout
        texts = response_texts(trajectory, pl_module.chat)
        golds = [gold_reward(prompt, text, self.gold) for prompt, text in zip(prompts, texts, strict=True)]
        logged = trainer.callback_metrics
        self.iterations.append(
            {
                "iteration": len(self.iterations) + 1,
                "gold": sum(golds) / len(golds),
                "score": float(logged["train/score"]),
                "kl": float(logged["train/kl"]),
            }
        )


def backbone(world: Path, **roles: Path) -> PolicyBackbone:
    return load_policies(str(world / "model"), {role: str(folder / "role") for role, folder in roles.items()})


def contents(prompts: list) -> set[str]:
    return {prompt[-1]["content"] for prompt in prompts}


def test_sampler_repeats_by_seed(world) -> None:
    model = backbone(world)
    prompts = [row["prompt"] for row in read_jsonl(world / "held_out.jsonl")]
    one, same, other = (Sampler(model, "reference", TOKENS, seed) for seed in (1, 1, 2))
    first, second = one(prompts), one(prompts)
    assert len(first) == len(prompts)
    assert first != second  # each call draws anew
    assert (first, second) == (same(prompts), same(prompts))
    assert other(prompts) not in (first, second)
    assert one(prompts[:1] * 4).count(first[0]) < 4  # a prompt that occurs again gets other answers


def preferences(world: Path, folder: Path, **options) -> tuple[list[dict], list[dict]]:
    settings = {"seed": 1, "pairs": 40, "validation_pairs": 6, "temperature": 0.0, "max_new_tokens": TOKENS}
    prompts = str(world / "prompts.jsonl")
    make_preferences(folder, model=str(world / "model"), prompts=prompts, **{**settings, **options})
    return read_jsonl(folder / "train.jsonl"), read_jsonl(folder / "validation.jsonl")


def margins(rows: list[dict]) -> list[float]:
    return [gold_reward(row["prompt"], row["chosen"]) - gold_reward(row["prompt"], row["rejected"]) for row in rows]


def test_preferences_have_prompts_of_their_own_and_follow_gold(world, tmp_path) -> None:
    train, validation = preferences(world, tmp_path)
    assert (len(train), len(validation)) == (40, 6)
    asked = [contents([row["prompt"] for row in rows]) for rows in (train, validation)]
    # Twice as many pairs as prompts: none of either share is left out, so that a shared one would be seen.
    assert [len(prompts) for prompts in asked] == [18, 2]
    assert not asked[0] & asked[1]
    assert asked[0] | asked[1] == contents([row["prompt"] for row in read_jsonl(world / "prompts.jsonl")])
    assert all(row["chosen"] != row["rejected"] for row in train + validation)
    assert all(len(row[answer].split()) <= TOKENS for row in train for answer in ("chosen", "rejected"))
    found = margins(train + validation)
    assert min(found) >= 0 and sum(margin > 0 for margin in found) > 20


def test_preferences_are_decided_by_the_seed_and_err_with_temperature(world, tmp_path) -> None:
    first = preferences(world, tmp_path / "a")
    assert preferences(world, tmp_path / "b") == first
    assert preferences(world, tmp_path / "c", seed=2) != first
    hot, _ = preferences(world, tmp_path / "d", temperature=100.0)
    assert 5 < sum(margin < 0 for margin in margins(hot)) < 35


@pytest.mark.parametrize("name", ["ppo", "rto"])
def test_the_curve_is_what_was_logged(policies, name) -> None:
    folder, truth = policies
    curve = read_curve(str(folder / name))
    assert [point["iteration"] for point in curve] == [1, 2, 3]
    for point, expected in zip(curve, truth[name], strict=True):
        assert point == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert len({point["score"] for point in curve}) > 1  # other answers each time
    assert curve[0]["kl"] == pytest.approx(0, abs=1e-6) and abs(curve[-1]["kl"]) > 1e-4
    assert read_curve(str(folder / "dpo")) == []


def held_out(world: Path) -> list:
    return [row["prompt"] for row in read_jsonl(world / "held_out.jsonl")]


@pytest.mark.parametrize("gold", ["sum", "requirement"])
def test_an_evaluation_measures_the_answers(world, policies, gold) -> None:
    prompts, model = held_out(world), backbone(world, dpo=policies[0] / "dpo")
    evaluation = evaluate_policy(model, "dpo", prompts, 3, TOKENS, seed=5, gold=gold)
    trajectory = Sampler(model, "dpo", TOKENS, seed=5).trajectory(prompts * 3)
    texts = response_texts(trajectory, model.chat)
    with torch.no_grad():
        dpo, reference = (model.token_logprobs(role, trajectory.sequences)[0] for role in ("dpo", "reference"))
    for number, prompt in enumerate(prompts):
        rows = [number, number + 5, number + 10]
        golds = [gold_reward(prompt, texts[row], gold) for row in rows]
        kl = [float((dpo - reference)[row][trajectory.sequences.response_mask[row]].sum()) for row in rows]
        lengths = [len(texts[row].split()) for row in rows]
        assert evaluation.answer_gold[number] == pytest.approx(golds)
        assert evaluation.answer_kl[number] == pytest.approx(kl, abs=1e-5)
        assert evaluation.answer_length[number] == lengths
        assert evaluation.gold[number] == pytest.approx(sum(golds) / 3)
        assert evaluation.kl[number] == pytest.approx(sum(kl) / 3, abs=1e-5)
        assert evaluation.length[number] == pytest.approx(sum(lengths) / 3)
    assert len(evaluation.gold) == len(prompts) and len({*evaluation.kl}) > 1


@pytest.mark.parametrize(("prompts", "answers"), [(0, 1), (1, 0)])
def test_nothing_to_evaluate_is_refused(world, prompts, answers) -> None:
    with pytest.raises(UserError, match=f"{answers} answers to {prompts} prompts measure nothing"):
        evaluate_policy(backbone(world), "reference", held_out(world)[:prompts], answers)


def test_tokens_are_rewarded_by_the_role(world, policies) -> None:
    prompts, model = held_out(world), backbone(world, dpo=policies[0] / "dpo")
    sampled = (prompts, 2, TOKENS, 5)
    rewarded = sample_rewarded_tokens(model, *sampled)
    assert rewarded.prompts == prompts * 2
    assert token_reward_correlation(model, *sampled) == token_correlation(*rewarded, ranked=True)
    assert token_reward_correlation(model, *sampled, role="reference") is None  # rewards of 0


@pytest.fixture(scope="module")
def reported(world, policies, tmp_path_factory) -> Path:
    folder, _ = policies
    output = tmp_path_factory.mktemp("report")
    policy_folders = {name: str(folder / name) for name in ("dpo", "ppo", "rto")}
    settings = {"max_new_tokens": TOKENS, "answers_per_prompt": 2, "examples": 2}
    prompts = str(world / "held_out.jsonl")
    report(output, seed=5, model=str(world / "model"), prompts=prompts, **policy_folders, **settings)
    return output


def test_the_report_compares_four_policies(world, policies, reported) -> None:
    text = (reported / "report.md").read_text(encoding="utf-8")
    assert "5 held-out prompts, 2 answers of each policy to each, seed 5" in text
    assert "over-optimization" in text.lower()
    table = read_table(text)
    assert list(table) == ["SFT", "DPO", "PPO", "RTO"]
    assert table["SFT"].kl == (0.0, 0.0)
    assert table["SFT"].gain is None and table["SFT"].win_rate is None
    assert table["DPO"].kl[0] > 0.01

    prompts = held_out(world) * 2
    model = backbone(world, dpo=policies[0] / "dpo")
    gold = {}
    for name, role in (("SFT", "reference"), ("DPO", "dpo")):
        answers = Sampler(model, role, TOKENS, seed=5)(prompts)
        gold[name] = numpy.array([gold_reward(prompt, a) for prompt, a in zip(prompts, answers, strict=True)])
        assert table[name].gold[0] == pytest.approx(gold[name].mean(), abs=0.0051)
    difference = (gold["DPO"] - gold["SFT"]).reshape(2, 5).mean(0)  # a prompt's two answers count as one
    assert table["DPO"].gain == pytest.approx((difference.mean(), difference.std(ddof=1) / 5**0.5), abs=0.0051)


def test_the_report_shows_token_rewards(world, policies, reported) -> None:
    text = (reported / "report.md").read_text(encoding="utf-8")
    blocks = [block.splitlines() for block in text.split("```")[1::2]]
    assert len(blocks) == 2
    prompts = held_out(world) * 2
    model = backbone(world, dpo=policies[0] / "dpo")
    sequences = Sampler(model, "reference", TOKENS, seed=5).trajectory(prompts).sequences
    with torch.no_grad():
        dpo, reference = (model.token_logprobs(role, sequences)[0] for role in ("dpo", "reference"))
    for row, block in enumerate(blocks):
        assert block[1] == prompts[row][-1]["content"]
        shown = [float(line.split()[1]) for line in block[3:] if line.split()[0] not in ("sum", "correlation")]
        expected = (dpo - reference)[row][sequences.response_mask[row]]
        assert shown == pytest.approx(expected.tolist(), abs=0.00051)
    assert expected.abs().max() > 0.01


def test_the_report_draws_both_runs(reported) -> None:
    image = matplotlib.image.imread(reported / "learning_curves.png")[..., :3]
    assert image.shape[0] > 200 and image.shape[1] > 600
    for colour in ("#0072B2", "#D55E00"):  # the lines of PPO and RTO
        near = numpy.abs(image - matplotlib.colors.to_rgb(colour)).max(-1) < 0.02
        thirds = numpy.array_split(near, 3, axis=1)
        assert all(third.sum() > 50 for third in thirds), "a panel has no line"


def compared(world: Path, output: Path, policies: dict[str, Path], **options) -> str:
    output.mkdir()
    settings = {"seed": 5, "max_new_tokens": TOKENS, "answers_per_prompt": 2, **options}
    folders = {name: str(folder) for name, folder in policies.items()}
    model, prompts = str(world / "model"), str(world / "held_out.jsonl")
    compare(output, model=model, prompts=prompts, policies=folders, **settings)
    return (output / "report.md").read_text(encoding="utf-8")


def test_a_comparison_has_the_rows_of_the_report_in_the_order_given(world, policies, reported, tmp_path) -> None:
    folder, _ = policies
    named = {"token rewards": folder / "rto", "v1.0": folder / "dpo", "score": folder / "ppo"}
    table = read_table(compared(world, tmp_path / "all", named))
    assert list(table) == ["SFT", *named]
    report = read_table((reported / "report.md").read_text(encoding="utf-8"))
    for name, same in (("SFT", "SFT"), ("token rewards", "RTO"), ("v1.0", "DPO"), ("score", "PPO")):
        assert table[name] == report[same]
    assert (tmp_path / "all/learning_curves.png").exists()


def test_a_comparison_without_iterations_has_no_curves(world, policies, tmp_path, capsys) -> None:
    text = compared(world, tmp_path / "dpo", {"DPO": policies[0] / "dpo"})
    assert "over-optimization" not in text.lower()
    assert [path.name for path in (tmp_path / "dpo").iterdir()] == ["report.md"]
    assert text in capsys.readouterr().out


def test_a_comparison_by_the_other_gold_reward(world, policies, tmp_path) -> None:
    dpo = policies[0] / "dpo"
    table = read_table(compared(world, tmp_path / "requirement", {"DPO": dpo}, gold="requirement"))
    evaluation = evaluate_policy(backbone(world, dpo=dpo), "dpo", held_out(world), 2, TOKENS, 5, "requirement")
    assert table["DPO"].gold[0] == pytest.approx(sum(evaluation.gold) / 5, abs=0.0051)
    by_sum = read_table(compared(world, tmp_path / "sum", {"DPO": dpo}))
    assert by_sum["DPO"].gold != table["DPO"].gold
    assert (by_sum["DPO"].kl, by_sum["DPO"].length) == (table["DPO"].kl, table["DPO"].length)


def test_a_policy_with_the_name_of_the_baseline_is_refused(world, policies, tmp_path) -> None:
    with pytest.raises(UserError, match="A policy is named SFT"):
        compared(world, tmp_path / "twice", {"SFT": policies[0] / "dpo"})
