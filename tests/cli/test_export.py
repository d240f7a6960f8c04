"""`rto-lightning export` on stages that the command has trained: roles, checkpoints, what the card says of them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint
import yaml
from safetensors.torch import load_file

from rto_lightning.backbone import RoleCard
from rto_lightning.cli import main
from tests.models import write_tiny_model
from tests.plain_peft import plain_model

OPTIMIZER = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-2}}
TRAINER = {"accelerator": "cpu", "max_steps": 2, "enable_model_summary": False, "enable_progress_bar": False}


def stage(name: str, data: str, source: str, backbone: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    """The configuration of a stage on the tiny model, as YAML would hold it."""
    settings = {"model": "base", "lora": {"rank": 2, "alpha": 4}, **backbone}
    return {
        "model": {"class_path": f"rto_lightning.modules.{name}", "init_args": {"backbone": settings, **arguments}},
        "data": {
            "class_path": f"rto_lightning.data.{data}",
            "init_args": {"train": source, "max_prompt_tokens": 60, "batch_size": 4},
        },
        "trainer": {**TRAINER, "num_sanity_val_steps": 0},
    }


def fit(name: str, config: dict[str, Any], *args: str) -> Path:
    Path(f"{name}.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", f"{name}.yaml", "--trainer.default_root_dir", f"runs/{name}", *args]) == 0
    return Path("runs") / name


def sft(**backbone: Any) -> dict[str, Any]:
    return stage("SFTModule", "DemonstrationDataModule", "rows.jsonl", backbone, optimizer=OPTIMIZER)


def write_inputs(folder: Path) -> None:
    """The base model `base` and the data `rows.jsonl`."""
    write_tiny_model(folder / "base")
    rows = [
        {"prompt": f"Question {n}?", "chosen": "yes" + "!" * (n % 3), "rejected": "no" + "." * (n % 4)}
        for n in range(8)
    ]
    lines = [json.dumps({**row, "response": row["chosen"]}) + "\n" for row in rows]
    (folder / "rows.jsonl").write_text("".join(lines))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with DPO, reward model and RTO (with a moving average), trained by the command; not to be written to."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_inputs(folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        data = "PreferenceDataModule", "rows.jsonl"
        fit("dpo", stage("PreferenceModule", *data, {}, optimizer=OPTIMIZER))
        statistics = {"samples": 4, "max_new_tokens": 4}
        reward = stage("RewardModelModule", *data, {}, optimizer=OPTIMIZER, score_statistics=statistics)
        fit("reward", reward)
        rto = stage(
            "RTOModule",
            "PromptDataModule",
            str(folder / "rows.jsonl"),  # absolute, for the card to hide
            {},
            dpo="runs/dpo/role",
            reward=str(folder / "runs/reward/role"),
            rollout={"max_new_tokens": 4},
            policy_optimizer=OPTIMIZER,
            critic_optimizer=OPTIMIZER,
            ema_decay=0.5,
        )
        fit("rto", rto)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def copied(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same runs, to write to."""
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def export(*args: str) -> Path:
    target = Path("out")
    shutil.rmtree(target, ignore_errors=True)
    assert main(["export", args[0], str(target), *args[1:]]) == 0
    return target


def same_adapter(folder: Path, role: Path) -> bool:
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (folder, role))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def run_card(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the lines of the model card print."""
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert "rto" not in code
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    return capsys.readouterr().out


def test_a_checkpoint_gives_what_the_stage_saved(copied):
    """Also where that is the moving average of the policy."""
    for name in ("dpo", "reward", "rto"):
        stage_folder = Path("runs") / name
        saved = copied / f"{name}_role"
        (stage_folder / "role").rename(saved)
        for source in (stage_folder, next((stage_folder / "checkpoints").glob("step=*.ckpt"))):
            folder = export(str(source))
            assert same_adapter(folder, saved)
            ours, theirs = (json.loads((path / "role.json").read_text()) for path in (folder, saved))
            for later in ("score_mean", "score_std", "settings"):  # known when training has ended
                ours[later] = theirs[later]
            assert ours == theirs
            if name == "reward":
                assert (folder / "head.safetensors").read_bytes() == (saved / "head.safetensors").read_bytes()
        saved.rename(stage_folder / "role")


def test_roles_of_a_stage(copied):
    assert same_adapter(export("runs/rto"), Path("runs/rto/role"))
    assert same_adapter(export("runs/rto", "--role", "dpo"), Path("runs/dpo/role"))
    assert same_adapter(export("runs/rto", "--role", "reward"), Path("runs/reward/role"))
    critic = export("runs/rto", "--role", "critic")
    [checkpoint] = Path("runs/rto/checkpoints").glob("step=*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    trained = load_file(critic / "adapter_model.safetensors")
    for name, weight in trained.items():
        inside = name.removeprefix("base_model.model.").replace(".weight", ".critic.weight")
        assert torch.equal(state[f"backbone.models.base.{inside}"], weight)
    assert torch.equal(state["backbone.heads.critic.weight"], load_file(critic / "head.safetensors")["weight"])
    card = RoleCard.read(critic)
    assert card is not None and card.role == "critic" and len(trained) == 28


def test_mistakes_about_roles(copied, capsys):
    def error(*args: str) -> str:
        assert main(["export", *args]) == 1
        return capsys.readouterr().err

    assert "has no role reward, and trains dpo" in error("runs/dpo", "out", "--role", "reward")
    [checkpoint] = Path("runs/dpo/checkpoints").glob("step=*.ckpt")
    assert "has no role critic" in error(str(checkpoint), "out", "--role", "critic")
    config = yaml.safe_load(Path("runs/dpo/config.yaml").read_text())
    config["model"]["init_args"]["backbone"]["lora"]["rank"] = 3
    Path("runs/dpo/config-2.yaml").write_text(yaml.safe_dump(config))
    assert "has another shape for backbone.models.base" in error(str(checkpoint), "out")
    config["model"]["init_args"]["backbone"]["lora"]["rankk"] = 3
    Path("runs/dpo/config-2.yaml").write_text(yaml.safe_dump(config))
    assert "do not fit this version" in error(str(checkpoint), "out")
    alone = shutil.copy(checkpoint, "alone.ckpt")
    assert "there is no config.yaml" in error(str(alone), "out")
    Path("runs/reward/checkpoints/last.ckpt").unlink()
    Path("runs/reward/checkpoints/last.ckpt").write_text("nothing")
    shutil.rmtree("runs/reward/role")
    assert "last.ckpt cannot be read" in error("runs/reward", "out")


def test_the_card_tells_the_stages(runs, copied, capsys):
    folder = export("runs/rto", "--merge", "--dtype", "float32")
    text = (folder / "README.md").read_text()
    for file in (path for path in folder.iterdir() if path.suffix in (".json", ".md", ".jinja")):
        assert str(runs) not in file.read_text() and str(copied) not in file.read_text(), file
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "transformers" and front["pipeline_tag"] == "text-generation"
    assert {"rto-lightning", "rto", "dpo", "reward-model"} <= set(front["tags"]) and "license" not in front
    for row in (
        "| DPO | dpo | token rewards | base |",
        "| reward model | reward | score | base |",
        "| RTO | policy | this export | base |",
        "| `model.rewards.beta_1` |  |  | 0.05 |",
        "| `model.backbone.lora.rank` | 2 | 2 | 2 |",
        "| RTO (policy) | rows.jsonl |  |  |",
    ):
        assert row in text, row
    assert "| train/reward/total | " in text and "seconds" not in text
    assert "AdamW, lr 0.01" in text and "Compared in float32 with the trained role" in text
    assert "it was not compared" not in text and "torch " in text
    assert run_card(folder, capsys).count("\n") >= 1


@pytest.mark.parametrize("kind", ["adapter", "reward", "classifier"])
def test_the_lines_of_the_card_run(copied, capsys, kind):
    source = {"adapter": ["runs/dpo"], "reward": ["runs/reward"], "classifier": ["runs/reward", "--merge"]}[kind]
    folder = export(*source)
    printed = run_card(folder, capsys)
    if kind != "adapter":
        assert abs(float(printed)) < 100
        export_of_role = kind == "classifier"
        assert ("AutoModelForSequenceClassification" in (folder / "README.md").read_text()) == export_of_role


def test_a_classifier_and_its_role_score_alike(copied, capsys):
    """By the lines of their cards."""
    role = float(run_card(export("runs/reward"), capsys))
    classifier = float(run_card(export("runs/reward", "--merge", "--dtype", "float32"), capsys))
    bias = load_file("runs/reward/role/head.safetensors")["bias"].item()
    assert classifier + bias == pytest.approx(role, abs=1e-4)


def test_data_and_base_of_the_hub_are_named(copied):
    path = Path("runs/dpo/config.yaml")
    config = yaml.safe_load(path.read_text())
    config["data"]["init_args"]["train"] = "owner/pairs:train"
    path.write_text(yaml.safe_dump(config))
    front = yaml.safe_load((export("runs/rto") / "README.md").read_text().split("---")[1])
    assert front["datasets"] == ["owner/pairs"] and front["library_name"] == "peft" and "lora" in front["tags"]


def test_a_4_bit_base_is_loaded_whole(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    folder = fit("sft", sft(quantization="nf4"))
    merged = export(str(folder), "--merge", "--dtype", "float32")
    ids = torch.tensor([[1, 40, 41, 42]])
    with torch.no_grad():
        expected = plain_model(Path("base"), folder / "role")(ids).logits
        torch.testing.assert_close(plain_model(merged)(ids).logits, expected, rtol=0, atol=1e-4)
    assert "| `model.backbone.quantization` | nf4 |" in (merged / "README.md").read_text()


def shard(checkpoint: Path, folder: Path) -> None:
    """Write a checkpoint file as Lightning's ModelParallelStrategy writes it on one rank."""
    contents = torch.load(checkpoint, weights_only=True)
    state = {"state_dict": contents.pop("state_dict")}
    state |= {f"optimizer_{n}": optimizer for n, optimizer in enumerate(contents.pop("optimizer_states"))}
    distributed_checkpoint.save(state, checkpoint_id=folder, no_dist=True)
    torch.save(contents, folder / "meta.pt")


@pytest.mark.parametrize("tied", [True, False])
def test_full_models_from_files_and_shards(tmp_path, monkeypatch, tied):
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    write_tiny_model(tmp_path / "base", tie_word_embeddings=tied)
    folder = fit("sft", sft(mode="full"))
    (folder / "role").rename("saved")
    [checkpoint] = (folder / "checkpoints").glob("step=*.ckpt")
    shard(checkpoint, folder / "checkpoints" / "shards.ckpt")
    trained = load_file("saved/model.safetensors")
    start = load_file("base/model.safetensors")
    assert not torch.equal(trained["model.norm.weight"], start["model.norm.weight"])
    for source in (folder, folder / "checkpoints" / "shards.ckpt"):
        written = load_file(export(str(source), "--dtype", "float32") / "model.safetensors")
        assert written.keys() == trained.keys() and ("lm_head.weight" in written) != tied
        assert all(torch.equal(written[name], weight) for name, weight in trained.items())


@pytest.mark.slow
def test_shards_of_two_ranks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    config = sft(mode="full")
    Path("sft.yaml").write_text(yaml.safe_dump(config))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "rto_lightning", "fit"]
    options = ["--config", "sft.yaml", "--trainer.default_root_dir", "runs/sft"]
    options += ["--trainer.strategy", "fsdp", "--trainer.devices", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *launch, *options], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    Path("runs/sft/role").rename("saved")
    assert (Path("runs/sft/checkpoints/last.ckpt") / ".metadata").exists()
    written = load_file(export("runs/sft", "--dtype", "float32") / "model.safetensors")
    trained = load_file("saved/model.safetensors")
    assert written.keys() == trained.keys()
    assert all(torch.equal(written[name], weight) for name, weight in trained.items())
