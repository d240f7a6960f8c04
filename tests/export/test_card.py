"""What the model card finds out about the way to a role."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rto_lightning.backbone import RoleCard
from rto_lightning.export.card import Exported, write_card
from rto_lightning.export.lineage import base_of, final_metrics, lineage
from rto_lightning.export.names import public_card, shown
from rto_lightning.saved.source import SavedRole, find_source, stage_config


def write_stage(name: str, module: str, role: str, data: dict[str, Any] | None = None, **arguments: Any) -> Path:
    """The folder of a stage with its settings and its role, but without weights."""
    folder = Path("runs") / name / "role"
    folder.mkdir(parents=True)
    backbone = {"mode": "full", "lora": {"rank": 16}, **arguments.pop("backbone")}
    model = {"class_path": f"rto_lightning.modules.{module}", "init_args": {"backbone": backbone, **arguments}}
    config = {"model": model, "data": {"class_path": "x.Y", "init_args": data or {}}, "trainer": {"max_steps": 7}}
    (folder.parent / "config.yaml").write_text(yaml.safe_dump(config))
    settings = {"beta": 0.25} if role == "dpo" else {}
    RoleCard(role, "model", backbone["model"], None, "", "", settings).write(folder)
    return folder


def write_pipeline(model: str) -> SavedRole:
    """SFT, DPO that starts from it, and PPO with an outside reward model and a role whose folder is gone."""
    sft = write_stage("sft", "SFTModule", "policy", {"train": "owner/chats:train[:10]"}, backbone={"model": model})
    dpo = write_stage("dpo", "PreferenceModule", "dpo", backbone={"model": str(sft)}, loss="simpo", beta=None)
    write_stage(
        "rto",
        "RTOModule",
        "policy",
        {"train": str(Path("prompts.jsonl").resolve()), "test": "elsewhere/prompts.jsonl", "batch_size": 64},
        backbone={"model": str(sft), "init": None},
        dpo=str(dpo),
        dpo_reference="runs/gone/role",
        reward="owner/reward",
        rewards={"beta_1": 0.0},
        critic={"init": "runs/critic/role", "shared": False},
    )
    source = find_source(Path("runs/rto"))
    assert isinstance(source, SavedRole)
    return source


def card_text(source: SavedRole) -> str:
    records = lineage(source, source.card)
    exported = Exported(
        name="me/model",
        on_hub=True,
        role="policy",
        kind="model",
        base=base_of(records, source.card),
        dtype="bfloat16",
        step=12,
        stop_token="</s>",
        has_template=False,
        has_head=False,
        missing_bias=0.0,
        agreement=None,
    )
    write_card(Path("."), exported, records)
    return Path("README.md").read_text()


@pytest.mark.parametrize(
    ("beta_1", "granularity", "estimator", "title", "method"),
    [
        (0.1, "token", "gae", "RTO", "PPO on token rewards of a DPO model and one score an answer"),
        (0.1, "sentence", "gae", "Semi-RTO", "PPO on token rewards of a DPO model, summed by sentence"),
        (0.1, "delayed", "gae", "DDPO", "PPO on the summed token rewards"),
        (0.1, "shaping", "gae", "RS-PPO", "PPO on one score an answer, shaped by"),
        (0.1, "token", "grpo", "RTO-GRPO", "GRPO on token rewards of a DPO model and one score an answer"),
        (0.0, "token", "gae", "PPO", "trained by PPO on one score an answer"),
        (0.0, "token", "rloo", "RLOO", "trained by RLOO on one score an answer"),
        (0.0, "token", "reinforce++", "REINFORCE++", "trained by REINFORCE++ on one score an answer"),
    ],
)
def test_the_method_is_that_of_the_settings(place, beta_1, granularity, estimator, title, method):
    rewards, ppo = {"beta_1": beta_1, "granularity": granularity}, {"estimator": estimator}
    write_stage("rto", "RTOModule", "policy", backbone={"model": "owner/base"}, rewards=rewards, ppo=ppo)
    source = find_source(Path("runs/rto"))
    assert [record.title for record in lineage(source, source.card)] == [title]
    text = card_text(source)
    assert method in text and f"- {title.lower()}\n" in text


def test_settings_of_a_loss_and_options_that_are_on_are_shown(place):
    losses = {"label_smoothing": 0.0, "length_coefficient": 0.01, "margin": 0.0, "kl_coefficient": 0.5}
    write_stage("dpo", "PreferenceModule", "dpo", backbone={"model": "owner/base"}, loss="rdpo", **losses)
    source = find_source(Path("runs/dpo"))
    text = card_text(source)
    assert "| `model.length_coefficient` | 0.01 |" in text
    assert not any(f"model.{name}" in text for name in losses if name != "length_coefficient")
    rewards, ppo = {"truncation_penalty": 2.0, "short_penalty": 0.0}, {"entropy_coefficient": 0.0, "kl_stop": 0.5}
    write_stage("rto", "RTOModule", "policy", backbone={"model": "owner/base"}, rewards=rewards, ppo=ppo)
    text = card_text(find_source(Path("runs/rto")))
    assert "| `model.rewards.truncation_penalty` | 2 |" in text and "| `model.ppo.kl_stop` | 0.5 |" in text
    assert "short_penalty" not in text and "entropy_coefficient" not in text


def test_stages_are_followed_back_to_the_base(place):
    source = write_pipeline("owner/base")
    records = lineage(source, source.card)
    assert [(record.title, record.used_as) for record in records] == [
        ("SFT", "start"),
        ("SimPO", "token rewards"),
        ("owner/reward", "score"),
        ("PPO", ""),
    ]
    text = card_text(source)
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "owner/base" and front["base_model_relation"] == "finetune"
    assert front["datasets"] == ["owner/chats"] and "license" not in front
    assert set(front["tags"]) == {"rto-lightning", "rlhf", "sft", "simpo", "ppo"}
    for line in (
        "| owner/reward | outside model | score |  |",
        "| `model.beta` |  | 0.25 |  |",
        "| `model.rewards.beta_1` |  |  | 0 |",
        "| `data.batch_size` |  |  | 64 |",
        "| PPO (policy) | prompts.jsonl |  | elsewhere/prompts.jsonl |",
        "Weights are bfloat16, from the checkpoint at step 12.",
        "They were not compared with the trained role.",
    ):
        assert line in text, line
    assert "lora" not in text and "shared" not in text and str(Path.cwd()) not in text


def test_a_base_that_is_a_folder_is_not_linked(place):
    Path("base").mkdir()
    text = card_text(write_pipeline(str(Path("base").resolve())))
    assert "base_model" not in yaml.safe_load(text.split("---")[1])
    assert "trained from `base`" in text and str(Path.cwd()) not in text


def test_a_role_without_its_settings_has_a_short_card(place):
    source = write_pipeline("owner/base")
    Path("runs/rto/config.yaml").unlink()
    source = SavedRole(source.folder, source.card, stage_config(Path("runs/rto")))
    text = card_text(source)
    assert "## Stages" in text and "## Settings" not in text and "## Data" not in text


def test_a_file_of_another_program_is_no_configuration(place):
    role = write_pipeline("owner/base").folder
    for contents in ("a: 1", "model: {class_path: nowhere.Class, init_args: {backbone: {model: m}}}"):
        Path("runs/rto/config.yaml").write_text(contents)
        source = find_source(role)
        assert isinstance(source, SavedRole) and source.config is None


def test_the_latest_settings_and_runs_count(place):
    write_pipeline("owner/base")
    folder = Path("runs/rto")
    for name in ("config-2.yaml", "config-3.yaml", "config-test.yaml"):
        (folder / name).write_text("")
    assert stage_config(folder) == folder / "config-3.yaml"
    for run, rows in (("fit", "0,9.0,"), ("fit-2", "0,1.0,\n1,,2.0\n2,3.0,"), ("test", "0,5.0,")):
        (folder / "metrics" / run).mkdir(parents=True)
        (folder / "metrics" / run / "metrics.csv").write_text(f"step,{run[0]}/loss,{run[0]}/seconds/all\n{rows}\n")
    assert final_metrics(folder) == [("f/loss", 3.0, 2), ("t/loss", 5.0, 0)]


def test_settings_are_shown_without_paths_of_this_machine():
    assert shown("/home/me/data.jsonl") == shown("~/data.jsonl") == "data.jsonl"
    assert shown("data/pairs.jsonl") == "data/pairs.jsonl"
    assert shown({"class_path": "torch.optim.SGD", "init_args": {"lr": 1e-6, "momentum": 0.9}}) == "SGD, lr 1e-06"
    statistics = {"the reward role /home/me/role": [0.0, 1.0], "the reward role runs/role": [2.0, 3.0]}
    card = RoleCard("policy", "model", "m", None, "", "", {"score_statistics": statistics, "other": 1})
    assert public_card(card).settings == {"score_statistics": {"the reward role runs/role": [2.0, 3.0]}, "other": 1}
    assert json.dumps(public_card(RoleCard("dpo", "model", "m", None, "", "", {"beta": 1})).settings) == '{"beta": 1}'
