"""A stage of a run, opened for a notebook."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rto_lightning.cli import main
from rto_lightning.cli.opening import open_stage
from rto_lightning.errors import UserError
from rto_lightning.runs.folder import last_checkpoint


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory) -> Path:
    """The folder of an RTO stage, after two iterations."""
    folder = tmp_path_factory.mktemp("opening")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Question {n}?"}) + "\n" for n in range(4)))
    settings: dict[str, Any] = {
        "trainer": {"accelerator": "cpu", "max_steps": 2, "default_root_dir": str(folder / "rto")},
        "model": {
            "class_path": "rto_lightning.modules.RTOModule",
            "init_args": {
                "backbone": {"model": str(tiny_model), "lora": {"rank": 4}},
                "reward_function": "tests.modules.stages:count_exclamations",
                "rollout": {"max_new_tokens": 8},
                "rewards": {"beta_1": 0, "normalize_score": False},
                "critic": {"init": "policy"},
                "policy_optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.1}},
                "critic_optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.1}},
            },
        },
        "data": {
            "class_path": "rto_lightning.data.PromptDataModule",
            "init_args": {"train": str(prompts), "max_prompt_tokens": 40, "batch_size": 4},
        },
    }
    (folder / "rto.yaml").write_text(yaml.safe_dump(settings))
    assert main(["fit", "--config", str(folder / "rto.yaml")]) == 0
    return folder / "rto"


def test_the_last_checkpoint_is_what_is_opened(run) -> None:
    module, data = open_stage(run)
    checkpoint = last_checkpoint(run)
    assert checkpoint is not None
    stored = torch.load(checkpoint, weights_only=True)["state_dict"]
    kept = module.kept_tensors()
    assert kept.keys() == stored.keys()
    for name, weight in stored.items():
        torch.testing.assert_close(kept[name].detach(), weight, rtol=0, atol=0, equal_nan=True)
    batch = next(iter(data.first_epoch()))
    experience = module.make_experience(module.rollout(batch, 2), batch.messages)
    assert experience.mask.shape[0] == 4 and float(experience.kl.abs().max()) > 0.01  # it has left the reference


def test_the_start_is_where_the_run_began(run) -> None:
    module, data = open_stage(run, weights="start")
    batch = next(iter(data.first_epoch()))
    experience = module.make_experience(module.rollout(batch, 0), batch.messages)
    assert experience.values is not None and float(experience.values.abs().max()) == 0  # the head begins with zeros
    assert float(experience.kl.abs().max()) < 1e-5


def test_folders_that_cannot_be_opened(run, tmp_path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.yaml; name the folder of a stage that has run"):
        open_stage(tmp_path)
    shutil.copy(run / "config.yaml", tmp_path)
    with pytest.raises(UserError, match="holds no checkpoint; ask for the weights of its start"):
        open_stage(tmp_path)
    assert open_stage(tmp_path, weights="start")[0].stage_name == "rto"
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["model"]["init_args"] |= {"dpo": str(tmp_path / "gone"), "rewards": {"beta_1": 0.1}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match="gone does not exist; the dpo stage makes it"):
        open_stage(tmp_path, weights="start")
