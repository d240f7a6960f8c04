"""What plain transformers and PEFT compute, and what a backbone computes, on the same tokens."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rto_lightning.backbone import BackboneSettings, PolicyBackbone, load_chat_tokenizer
from tests.models import some_sequences
from tests.plain_peft import plain_model, rows_without_padding


@torch.no_grad()
def plain_logits(folder: Path, adapter: Path | str | None = None, dtype: str = "float32") -> Tensor:
    """Logits (N, V) of every token of `some_sequences`, row after row, in float32."""
    model = plain_model(folder, adapter, dtype)
    return torch.cat([model(ids).logits[0].float() for _, ids, _ in rows_without_padding(some_sequences())])


@torch.no_grad()
def role_scores(model: Path, role: str, **changes: Any) -> Tensor:
    """Scores (B,) of `some_sequences` by a saved reward role on a backbone."""
    settings = BackboneSettings(str(model), **changes)
    backbone = PolicyBackbone(settings, load_chat_tokenizer(settings))
    backbone.add_role("reward", role, scalar_head=True)
    return backbone.sequence_scores("reward", some_sequences())


@torch.no_grad()
def classifier_scores(folder: Path, padding: str) -> Tensor:
    """Scores (B,) of `some_sequences` by transformers' class, all in one batch that is padded on one side."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=padding)
    rows = [ids[0].tolist() for _, ids, _ in rows_without_padding(some_sequences())]
    return model(**tokenizer.pad({"input_ids": rows}, return_tensors="pt")).logits.squeeze(-1)


def weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the safetensors files of a folder, shards and adapter included."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found
