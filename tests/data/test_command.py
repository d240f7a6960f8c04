"""What the command does with the settings of the data."""

import json

import pytest
import torch

from rto_lightning.cli import main


@pytest.fixture
def command(tiny_model, jsonl, tmp_path):
    for n in range(3):
        jsonl([{"prompt": f"{n} {i}", "response": "Yes"} for i in range(4)], f"shard{n}.jsonl")
    trainer = {
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    model = {"class_path": "rto_lightning.modules.SFTModule", "init_args": {"backbone": {"model": str(tiny_model)}}}
    held_out = str(tmp_path / "shard0.jsonl")
    data = {
        "class_path": "rto_lightning.data.DemonstrationDataModule",
        "init_args": {"train": f"{tmp_path}/*.jsonl", "validation": held_out, "batch_size": 4, "streaming": True},
    }
    path = tmp_path / "sft.yaml"
    path.write_text(json.dumps({"trainer": trainer, "model": model, "data": data}))
    return lambda *options: main(
        ["fit", "--config", str(path), "--trainer.default_root_dir", str(tmp_path / "run"), *options]
    )


def test_shards_are_streamed_through_several_passes(command, tmp_path):
    assert command("--trainer.max_steps=5", "--data.shuffle_buffer_rows=3") == 0
    [checkpoint] = (tmp_path / "run").rglob("*step=5.ckpt")
    assert torch.load(checkpoint, weights_only=True)["epoch"] >= 1


def test_a_stream_without_an_end_is_refused_in_one_sentence(command, capsys):
    assert command("--trainer.max_epochs=1") != 0
    assert "data.streaming does not go with a trainer without an end" in capsys.readouterr().err
