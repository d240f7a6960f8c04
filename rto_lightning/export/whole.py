"""A role as a model of its own, without adapters: a causal language model, or a sequence classifier."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rto_lightning.backbone import Sequences
from rto_lightning.backbone.heads import HEAD_FILE
from rto_lightning.backbone.loading import save_model
from rto_lightning.export.check import model_values, require_equal
from rto_lightning.export.classifier import as_classifier, padding_token
from rto_lightning.export.merge import load_plain, merge_adapter, round_weights
from rto_lightning.export.names import public_card, shown
from rto_lightning.saved.opening import OpenedRole


@dataclass
class WholeModel:
    """What is to be written."""

    model: PreTrainedModel
    """Not yet in the data type of the export."""
    is_classifier: bool
    """Whether it is a sequence classifier."""
    missing_bias: float = 0.0
    """What has to be added to its scores to get those of the role."""
    padding: str | None = None
    """The padding token of a classifier, if there is one."""


def whole_model(role: OpenedRole, dtype: torch.dtype, exact: bool, classifier: bool) -> WholeModel:
    """Make a model of a role, whose backbone cannot be used any more.

    Args:
        role: an adapter, whose base is loaded anew, or a model.
        dtype: of the export.
        exact: leave the weights unrounded, in float32.
        classifier: whether it becomes a sequence classifier with the role's head.
    """
    if role.is_adapter:
        with tempfile.TemporaryDirectory() as folder:
            adapter = Path(folder) / "adapter"
            role.backbone.save_role(role.name, adapter, role.card)
            role.release()
            base = load_plain(role.settings, torch.float32 if exact else "auto")
            model = merge_adapter(base, adapter, torch.float32 if exact else dtype)
    else:
        model = role.model
    if not classifier:
        return WholeModel(model, False)
    assert role.head is not None
    padding = padding_token(role.chat)
    pad_id: Any = role.chat.tokenizer.convert_tokens_to_ids(padding) if padding is not None else None
    made, missing_bias = as_classifier(model, role.head, pad_id)
    return WholeModel(made, True, missing_bias, padding)


def round_and_read(whole: WholeModel, source: Tensor, sequences: Sequences, dtype: torch.dtype) -> Tensor:
    """See that a model is what the role was, then round its weights, in place, and read it again.

    Args:
        whole: from `whole_model(exact=True)`.
        source: what the role said; see :func:`rto_lightning.export.check.source_values`.
        sequences: of what.
        dtype: of the export.

    Returns:
        What an export must say; in float32 nothing is rounded, and it is the source.

    Raises:
        UserError: if it differs before it is rounded.
    """
    values = model_values(whole.model, sequences, whole.is_classifier) + whole.missing_bias
    require_equal(values, source, "the whole model")
    if dtype == torch.float32:
        return source
    round_weights(whole.model, dtype)
    return model_values(whole.model, sequences, whole.is_classifier) + whole.missing_bias


def save_whole(whole: WholeModel, role: OpenedRole, folder: Path, dtype: torch.dtype, max_shard_size: str) -> None:
    """Write a model with its tokenizer; a language model also with `role.json`, and its head if it has one.

    Args:
        whole: what to write; it is changed to `dtype`.
        role: where it comes from.
        folder: exists and is empty.
        dtype: of the weights.
        max_shard_size: largest file, such as `5GB`.
    """
    model, tokenizer = whole.model, role.chat.tokenizer
    nn.Module.to(model, dtype)
    if whole.is_classifier:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer.pad_token = whole.padding
        tokenizer.save_pretrained(folder)
        return
    save_model(model, folder, None, role.chat, max_shard_size)
    tokenizer.save_pretrained(folder)
    if role.head is not None:
        save_file({key: value.to(dtype) for key, value in role.head.items()}, folder / HEAD_FILE)
    replace(public_card(role.card), kind="model", base_model=shown(role.card.base_model)).write(folder)
