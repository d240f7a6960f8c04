"""`rto-lightning plan`, and what a run says of its memory."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, DebertaV2Config

from rto_lightning import memory
from rto_lightning.cli import main
from rto_lightning.cli.plan import plan_stage, planned_device

RTO: dict[str, Any] = {
    "model": {
        "class_path": "rto_lightning.modules.RTOModule",
        "init_args": {
            "backbone": {"model": "MODEL", "lora": {"rank": 4}},
            "dpo": "outputs/runs/dpo/role",
            "reward": "outputs/runs/reward/role",
            "rollout": {"max_new_tokens": 8},
            "ppo": {"microbatch_size": 2},
        },
    },
    "data": {
        "class_path": "rto_lightning.data.PromptDataModule",
        "init_args": {"train": "prompts.jsonl", "max_prompt_tokens": 40, "batch_size": 4},
    },
}
SFT: dict[str, Any] = {
    "model": {"class_path": "rto_lightning.modules.SFTModule", "init_args": {"backbone": {"model": "MODEL"}}},
    "data": {
        "class_path": "rto_lightning.data.DemonstrationDataModule",
        "init_args": {"train": "demonstrations.jsonl", "max_prompt_tokens": 40, "batch_size": 2},
    },
    "trainer": {"accelerator": "cpu", "max_steps": 1, "enable_model_summary": False, "default_root_dir": "out"},
}


@pytest.fixture(autouse=True)
def folder(tiny_model, tmp_path, monkeypatch) -> Path:
    """A folder with a configuration of the tiny model, and nothing else of it."""
    monkeypatch.chdir(tmp_path)
    Path("MODEL").mkdir()
    shutil.copy(tiny_model / "config.json", "MODEL")
    Path("rto.yaml").write_text(yaml.safe_dump(RTO))
    Path("sft.yaml").write_text(yaml.safe_dump(SFT))
    return tmp_path


@pytest.fixture
def trainable(tiny_model) -> None:
    """The whole model, and something to train on."""
    shutil.copytree(tiny_model, "MODEL", dirs_exist_ok=True)
    rows = [{"prompt": f"Question {n}?", "response": "yes"} for n in range(2)]
    Path("demonstrations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def planned(capsys, *args: str) -> dict[str, Any]:
    assert main(["plan", "--json", *args]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_plan_needs_only_the_configuration_of_the_model(capsys, folder):
    before = sorted(folder.rglob("*"))
    assert main(["plan", "--config", "rto.yaml"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == f"Memory plan of rto on {planned_device('auto').type}, 32-true: MODEL"
    assert "40 prompt + 8 response tokens; 4 responses an iteration" in lines[1]
    for row in ("weights", "resident", "+ rollout", "+ scoring", "+ update of policy", "peak"):
        assert any(line.startswith(row) for line in lines), row
    assert max(map(len, lines[2:])) <= 80
    assert sorted(folder.rglob("*")) == before


def test_json_has_the_same_sums(capsys):
    plan = planned(capsys, "--config", "rto.yaml", "--trainer.accelerator", "cpu")
    assert set(plan["weights"]) == {"base", "policy", "dpo", "reward", "critic"}
    assert set(plan["optimizers"]) == {"policy", "critic"} and plan["device"] == "cpu"
    sums = sum(plan["weights"].values()) + sum(plan["optimizers"].values())
    assert plan["resident"] == plan["process"] + sums and plan["process"] > 2**26
    assert plan["peak"] == plan["resident"] + max(phase["bytes"] for phase in plan["phases"])
    assert plan["peak"] < plan["available"] and plan["changes"] == {}


def test_the_plan_is_there_as_data_too(capsys):
    options = ["--config", "rto.yaml", "--trainer.accelerator", "gpu"]
    assert plan_stage(options).peak == planned(capsys, *options)["peak"]


def test_settings_are_those_of_fit(capsys):
    base = planned(capsys, "--config", "rto.yaml")
    full = planned(capsys, "--config", "rto.yaml", "--model.backbone.mode", "full", "--data.batch_size=8")
    assert full["weights"]["policy"] == full["weights"]["dpo"] > base["weights"]["policy"] > 0
    caches = [plan["phases"][0]["items"]["KV cache"] for plan in (base, full)]
    assert caches[1] == 2 * caches[0]


def test_its_own_options_are_in_its_help(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--json", "--processes N", "--bandwidth_gb_s X", "fit --help"))


def test_an_overlay_before_its_stage_is_refused(capsys, folder):
    (folder / "overlay.yaml").write_text("model: {beta: 0.1}")
    assert main(["plan", "--config", "overlay.yaml", "--config", "rto.yaml"]) == 2
    assert "overlay.yaml is an overlay of a stage; put it after" in capsys.readouterr().err


def test_a_trained_role_is_in_nobodys_way(capsys):
    Path("out/role").mkdir(parents=True)
    assert planned(capsys, "--config", "sft.yaml")["peak"] > 0


def test_the_device_need_not_be_there(capsys, monkeypatch):
    """What is available is then not known, and the changes say how far one could get."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["plan", "--config", "sft.yaml", "--trainer.accelerator", "gpu"]) == 0
    table, _, changes = capsys.readouterr().out.partition("peak with one change")
    assert "on cuda" in table and "no GPU here" in table and "process" not in table
    assert "data.batch_size 1 with trainer.accumulate_grad_batches times 2" in changes


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model.backbone.model", "./nowhere"], "needs the config.json of ./nowhere"),
        (["--config", "none.yaml"], "none.yaml does not exist"),
        (["--model.dpo", "null"], "rewards.beta_1 is not 0"),
    ],
)
def test_mistakes_are_told_in_one_sentence(capsys, args, words):
    assert main(["plan", "--config", "rto.yaml", *args]) in (1, 2)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and words in captured.err


def test_an_encoder_may_score(capsys):
    config = DebertaV2Config(
        num_hidden_layers=4,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        relative_attention=True,
        num_labels=1,
    )
    config.save_pretrained("CLASSIFIER")
    options = "--model.reward", "./CLASSIFIER", "--model.critic.init", "policy"
    plan = planned(capsys, "--config", "rto.yaml", *options)
    model = AutoModelForSequenceClassification.from_config(config)
    assert plan["weights"]["./CLASSIFIER"] == 4 * sum(weight.numel() for weight in model.parameters())


def test_a_stage_that_cannot_be_planned_is_told_in_one_sentence(capsys, monkeypatch):
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("an unknown architecture.\nand more")

    monkeypatch.setattr(memory, "plan_memory", fail)
    assert main(["plan", "--config", "rto.yaml"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == (
        "rto-lightning: error: this stage cannot be planned (RuntimeError: an unknown architecture); "
        "`rto-lightning fit` runs without a plan and writes the memory it took.\n"
    )


def test_a_run_ends_with_planned_and_measured_peak(capsys, trainable):
    assert main(["fit", "--config", "sft.yaml"]) == 0
    written = json.loads(Path("out/memory.json").read_text())
    planned_peak, measured = written["planned"]["peak"], written["measured_peak"]
    assert planned_peak / measured == pytest.approx(1, rel=0.2)
    assert written["planned"]["weights"]["base"] > 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("peak memory: ")]
    assert f"{memory.show_bytes(planned_peak)} planned, {memory.show_bytes(measured)} measured" in line
    assert line.endswith("out/memory.json")


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What is warned of on a machine that has 1 MiB."""
    monkeypatch.setattr(memory.measure, "available_bytes", lambda device: 2**20)
    said: list[str] = []
    monkeypatch.setattr("rto_lightning.callbacks.memory_report.rank_zero_warn", said.append)
    monkeypatch.setattr("rto_lightning.data.module.ChatDataModule.prepare_data", lambda data: None)
    monkeypatch.setattr("rto_lightning.data.module.ChatDataModule.setup", lambda data, stage: None)
    return said


def test_a_run_warns_before_it_loads_what_does_not_fit(said):
    assert main(["fit", "--config", "sft.yaml"]) == 1  # there is no model to load
    [sentence] = said
    assert sentence.startswith("the memory plan takes ") and "but 1.0 MiB are available; " in sentence


def test_a_run_warns_also_if_proposals_fail(said, monkeypatch):
    def fail(*args: Any) -> None:
        raise RuntimeError("no proposals")

    monkeypatch.setattr(memory, "proposed_changes", fail)
    assert main(["fit", "--config", "sft.yaml"]) == 1
    [sentence] = said
    assert "but 1.0 MiB are available; use a smaller model or a larger device." in sentence


def test_a_plan_that_fails_does_not_end_a_run(trainable, monkeypatch, capsys):
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("an unknown architecture")

    monkeypatch.setattr(memory, "plan_memory", fail)
    assert main(["fit", "--config", "sft.yaml"]) == 0
    captured = capsys.readouterr()
    written = json.loads(Path("out/memory.json").read_text())
    assert Path("out/role").is_dir() and written["planned"] is None
    taken = memory.show_bytes(written["measured_peak"])
    assert f"peak memory: {taken} measured: " in captured.out
    assert "planned" not in captured.out and "architecture" not in captured.out + captured.err


FULL_FSDP = ("--model.backbone.mode", "full", "--trainer.strategy", "fsdp", "--trainer.accelerator", "cpu")


def test_a_plan_of_several_devices_is_that_of_one(capsys):
    """Of devices that are not there."""
    whole = planned(capsys, "--config", "rto.yaml", *FULL_FSDP[:2], *FULL_FSDP[4:])
    share = planned(capsys, "--config", "rto.yaml", *FULL_FSDP, "--processes=4")
    assert (share["processes"], share["sharing"]) == (4, "fsdp") and whole["processes"] == 1
    for role in whole["weights"]:
        assert share["weights"][role] == pytest.approx(whole["weights"][role] / 4, rel=0.05)
    assert "1 responses an iteration" in share["batch"]
    operations = {(found["phase"], found["operation"]) for found in share["transfers"]}
    assert ("rollout", "all-gather of weights") in operations
    assert ("update of critic", "reduce-scatter of gradients") in operations and "transfers" not in whole
    assert [found["phase"] for found in share["computations"]] == [phase["name"] for phase in share["phases"]]


def test_the_table_of_several_devices_says_what_they_communicate(capsys):
    assert main(["plan", "--config", "rto.yaml", *FULL_FSDP, "--trainer.devices", "2", "--bandwidth_gb_s", "25"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "one of 2 processes, fsdp; rows are those of one process"
    assert any(line.startswith("communication a process and iteration") and "s at 25 GB/s" in line for line in lines)
    assert any(line.startswith("    gathered weights") for line in lines)
    assert max(map(len, lines[3:])) <= 80


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--processes", "3"], "data.batch_size 4 counts rows over all devices"),
        (["--processes", "many"], "--processes: invalid int value: 'many'"),
        (["--bandwidth_gb_s", "0"], "--bandwidth_gb_s is 0.0; set it above 0"),
        (["--json=x"], "--json: ignored explicit argument 'x'; leave the value out"),
        (["--bandwidth_gb_s", "nan"], "--bandwidth_gb_s is nan; set it above 0"),
        (["--trainer.strategy", "deepspeed"], "trainer.strategy deepspeed does not run the stages here"),
    ],
)
def test_what_cannot_be_spread_is_told_in_one_sentence(capsys, args, words):
    assert main(["plan", "--config", "rto.yaml", *args]) in (1, 2)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and words in captured.err
