"""Hostile checkpoints and settings, and secrets, met by commands: no code runs, and nothing is switched on or shown."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint
import yaml
from lightning.pytorch import Callback

from rto_lightning.backbone.shard_files import INDEX_FILE, load_shards
from rto_lightning.cli import main
from rto_lightning.errors import UserError
from rto_lightning.secrets import MASK
from tests.faults.matrix import FaultMatrix
from tests.hostile import MODELS, PWNED, code, linked_outside, payload
from tests.roles import save_random_role

pytestmark = pytest.mark.slow

CANARY = "Canary-0123456789"


def stage_of(model: Path, folder: Path, **changes: Any) -> Path:
    """Files of an SFT stage in a folder."""
    rows = folder / "rows.jsonl"
    rows.write_text('{"prompt": "Hi", "response": "yes"}\n' * 8)
    config = {
        "model": {
            "class_path": "rto_lightning.modules.SFTModule",
            "init_args": {"backbone": {"model": str(model), "lora": {"rank": 2}, **changes}},
        },
        "data": {
            "class_path": "rto_lightning.data.DemonstrationDataModule",
            "init_args": {"train": str(rows), "max_prompt_tokens": 60, "batch_size": 4},
        },
        "trainer": {"accelerator": "cpu", "max_steps": 1, "enable_progress_bar": False, "logger": False},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    capsys.readouterr()
    assert main(args) in (1, 2)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("rto-lightning: error: ")
    return error


@pytest.mark.parametrize("what", ["weights", "settings", "a pickle of the old kind", "text"])
def test_a_hostile_checkpoint(
    what: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], faults: FaultMatrix
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    config, checkpoint = stage_of(tiny_model, folder), folder / "evil.ckpt"
    if what == "a pickle of the old kind":
        checkpoint.write_bytes(pickle.dumps(payload(folder)))
    elif what == "text":
        checkpoint.write_text("<html>not found</html>")
    else:
        contents = {"state_dict": {}, "global_step": 1, "hyper_parameters": {}}
        contents |= {"weights": {"state_dict": payload(folder)}, "settings": {"hyper_parameters": payload(folder)}}[
            what
        ]
        torch.save(contents, checkpoint)
    with faults.tried("trust", f"checkpoint: {what}"):
        resumed = ["fit", "--config", str(config), "--ckpt_path", str(checkpoint)]
        for command in (resumed, ["export", str(checkpoint), str(tmp_path / "out")]):
            assert "cannot be read" in fails(capsys, *command)
            assert not (tmp_path / PWNED).exists()


def test_a_checkpoint_does_not_change_settings(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], faults: FaultMatrix
) -> None:
    """LightningCLI takes settings from checkpoints, which could so switch `trust_remote_code` on."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = stage_of(tiny_model, folder)
    assert main(["fit", "--config", str(config), "--trainer.default_root_dir", str(folder / "first")]) == 0
    [checkpoint] = (folder / "first" / "checkpoints").glob("step=*.ckpt")
    contents = torch.load(checkpoint, weights_only=True)
    contents["hyper_parameters"] = {"init_args": {"backbone": {"trust_remote_code": True}}}
    torch.save(contents, folder / "evil.ckpt")
    with faults.tried("trust", "checkpoint: settings that switch trust on"):
        args = ["--config", str(config), "--ckpt_path", str(folder / "evil.ckpt"), "--trainer.max_steps", "2"]
        assert main(["fit", *args, "--trainer.default_root_dir", str(folder / "second")]) == 0
        written = yaml.safe_load((folder / "second" / "config.yaml").read_text())
        assert written["model"]["init_args"]["backbone"]["trust_remote_code"] is False


@pytest.mark.parametrize("what", ["index", "a value", "a place outside", "a damaged index", "a link"])
def test_hostile_shards(what: str, tmp_path: Path, faults: FaultMatrix) -> None:
    folder = tmp_path / "shards" / "evil.ckpt"
    value = payload(folder) if what == "a value" else 0.1
    state = {"state_dict": {"weight": torch.ones(2)}, "optimizer_0": {"lr": value}}
    distributed_checkpoint.save(state, checkpoint_id=folder, no_dist=True)
    index = folder / INDEX_FILE
    if what == "index":
        index.write_bytes(pickle.dumps(payload(folder)))
    elif what == "a damaged index":
        index.write_bytes(index.read_bytes()[:50])
    elif what == "a place outside":
        index.write_bytes(index.read_bytes().replace(b"__0_0.distcp", b"../../x.ckpt"))
    elif what == "a link":
        linked_outside(folder, "__0_0.distcp")
    message = "cannot be read|which is not in its folder|is a link out of its folder"
    with faults.tried("trust", f"shards: {what}"):
        with pytest.raises(UserError, match=message) as error:
            load_shards({"state_dict": {"weight": torch.zeros(2)}, "optimizer_0": {"lr": 0.0}}, folder, no_dist=True)
        assert "\n" not in str(error.value)
        assert not (folder.parent / PWNED).exists()


# Settings that lie beside a role or a checkpoint ---------------------------------------------------------------


@pytest.mark.parametrize("key", ["stage", "optimizer"])
def test_export_does_not_import_what_settings_name(
    key: str,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    faults: FaultMatrix,
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "evil_module.py").write_text(code(folder) + "class Stage:\n    saved_as = 'policy'\n")
    monkeypatch.syspath_prepend(folder)
    config = stage_of(tiny_model, folder)
    contents = yaml.safe_load(config.read_text())
    if key == "stage":
        contents["model"]["class_path"] = "evil_module.Stage"
    else:
        contents["model"]["init_args"]["optimizer"] = {"class_path": "evil_module.Stage", "init_args": {}}
    config.write_text(yaml.safe_dump(contents))
    torch.save({"state_dict": {}, "global_step": 1}, folder / "a.ckpt")
    with faults.tried("trust", f"settings: {key} of another program"):
        error = fails(capsys, "export", str(folder / "a.ckpt"), str(tmp_path / "out"))
        assert "names the class evil_module.Stage, whose code is not part of rto-lightning" in error
        assert not (tmp_path / PWNED).exists()


def test_a_config_beside_a_role_does_not_switch_trust_on(
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    faults: FaultMatrix,
) -> None:
    spoil, _ = MODELS["code for its configuration"]
    base, run = tmp_path / "hostile" / "model", tmp_path / "run"
    shutil.copytree(tiny_model, base)
    spoil(base)
    save_random_role(tiny_model, run / "role", "dpo")
    stage_of(base, run, trust_remote_code=True)
    with faults.tried("trust", "settings: trust_remote_code beside a role"):
        error = fails(capsys, "export", str(run / "role"), str(tmp_path / "out"), "--base_model", str(base))
        assert "needs code that its folder brings along, which is not run" in error
        assert not (base.parent / PWNED).exists()


# Secrets -------------------------------------------------------------------------------------------------------


class Reporter(Callback):
    """What tells a service of a run would need."""

    def __init__(self, api_key: str, address: str) -> None:
        self.api_key = api_key
        self.address = address


def test_a_run_leaves_no_secret_anywhere(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    faults: FaultMatrix,
) -> None:
    """In its environment, its settings, an address and the name of a file that is not there."""
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    run = tmp_path / "run"
    path = stage_of(tiny_model, tmp_path)
    config = yaml.safe_load(path.read_text())
    reporter = {"api_key": "in-the-settings", "address": f"https://me:{CANARY}@host"}
    config["trainer"] |= {
        "default_root_dir": str(run),
        "logger": True,
        "callbacks": {"class_path": "tests.faults.test_trust_in_runs.Reporter", "init_args": reporter},
    }
    path.write_text(yaml.safe_dump(config))
    with faults.tried("trust", "secrets in the environment and the settings of a run"):
        assert main(["fit", "--config", str(path)]) == 0
        saved = run / "config.yaml"
        assert MASK in saved.read_text()
        elsewhere = ["--trainer.default_root_dir", str(tmp_path / "again")]
        assert main(["fit", "--config", str(saved), *elsewhere]) == 1
        assert main(["fit", "--config", str(path), *elsewhere, "--data.init_args.train", f"/{CANARY}.jsonl"]) == 1
        shown = capfd.readouterr()
        assert "trainer.callbacks.init_args.api_key is a secret that was masked" in shown.err
        assert f"/{MASK}.jsonl" in shown.err
        assert CANARY not in shown.out + shown.err and "in-the-settings" not in shown.out + shown.err
        written = [file for file in run.rglob("*") if file.is_file()]
        assert len(written) > 8 and run / "role" / "role.json" in written
        for secret in (CANARY, "in-the-settings"):
            assert [file for file in written if secret.encode() in file.read_bytes()] == []
