import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen2Config

from rto_lightning.backbone import BackboneSettings
from rto_lightning.data import DemonstrationDataModule
from rto_lightning.errors import UserError
from rto_lightning.memory import plan_memory, workload_of
from rto_lightning.memory.shapes import StageShapes, layers_are_alike, shortened
from rto_lightning.memory.workload import OutsideModel, Workload
from tests.modules import stages

SHAPE: dict[str, Any] = dict(vocab_size=320, hidden_size=64, intermediate_size=160, num_attention_heads=4)


def sft(folder: Path, **settings: Any) -> Workload:
    return workload_of(stages.sft(folder, **settings), DemonstrationDataModule(train="x", **stages.LIMITS))


def test_layers_that_differ_are_seen():
    alike = Qwen2Config(**SHAPE, num_hidden_layers=6)
    mixed = Qwen2Config(**SHAPE, num_hidden_layers=6, use_sliding_window=True, max_window_layers=3)
    settings = BackboneSettings("x")
    assert layers_are_alike(alike, settings) and not layers_are_alike(mixed, settings)
    assert shortened(mixed, 4).layer_types == mixed.layer_types[:4] and len(mixed.layer_types) == 6


def test_shapes_hold_no_memory(tmp_path):
    """A model of 40 GB, whose one weight file is not there."""
    LlamaConfig(**{**SHAPE, "hidden_size": 32768, "intermediate_size": 65536}, num_hidden_layers=2).save_pretrained(
        tmp_path
    )
    shapes = StageShapes(sft(tmp_path), None)
    assert shapes.base_bytes() > 40e9 and len(shapes.parameters("policy")) == 2 * 7 * 2


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_the_code_of_a_model_runs_only_if_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("asked on the terminal"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    config = LlamaConfig(**SHAPE, num_hidden_layers=5).to_dict()
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(OWN_CODE)
    trusted = sft(tmp_path, trust_remote_code=True)
    assert plan_memory(trusted).peak > 0
    with pytest.raises(UserError, match="contains custom code"):
        plan_memory(sft(tmp_path))
    with pytest.raises(UserError, match="contains custom code"):
        plan_memory(replace(trusted, outside=(OutsideModel(str(tmp_path)),)))
