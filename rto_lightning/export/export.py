"""The order of an export: find the role, read it, write it, compare, describe, publish.

What is written stands beside its place until it has passed the comparison, so that a folder of that name is always
whole and right.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from rto_lightning.backbone.roles import looks_like_hub_name
from rto_lightning.errors import UserError
from rto_lightning.export.card import Exported, write_card
from rto_lightning.export.check import Agreement, check_sequences, compare, exported_values, source_values
from rto_lightning.export.hub import check_push, push
from rto_lightning.export.lineage import base_of, lineage
from rto_lightning.export.names import public_card
from rto_lightning.export.settings import ExportSettings
from rto_lightning.export.whole import round_and_read, save_whole, whole_model
from rto_lightning.modules import StageModule
from rto_lightning.runs.files import PARTIAL, check_room
from rto_lightning.saved.opening import OpenedRole, open_role, release_weights
from rto_lightning.saved.source import find_source


@dataclass(frozen=True)
class _Written:
    """What one of the two kinds of folder came to."""

    kind: str
    dtype: str
    agreement: Agreement | None
    missing_bias: float = 0.0


def export_role(settings: ExportSettings, load_module: Callable[[Path], StageModule]) -> Exported:
    """Write a role as a folder that PEFT or transformers load, with a model card, and upload it if asked.

    Args:
        settings: what, and how.
        load_module: builds the stage of a `config.yaml`, for checkpoints.

    Returns:
        What was written.

    Raises:
        UserError: if settings contradict each other, if the role or its base model cannot be loaded, if the export
            differs from the role by more than rounding explains, if the disk has no room for it, or if the hub refuses
            it.
    """
    target = settings.target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists already and is not empty; remove it or choose another folder.")
    if settings.push_to_hub is not None:
        check_push(settings.push_to_hub)
    source = find_source(settings.source, settings.role, settings.trust_remote_code)
    role = open_role(source, settings.check, settings.base_model, load_module, settings.trust_remote_code)
    _check_adapter(settings, role)
    records = lineage(source, role.card)
    partial = target.with_name(target.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)  # left by an export that was interrupted
    partial.mkdir(parents=True)
    try:
        stays_adapter = role.is_adapter and not settings.merge
        written = _write_adapter(settings, role, partial) if stays_adapter else _write_whole(settings, role, partial)
        exported = Exported(
            name=settings.push_to_hub or target.name,
            on_hub=settings.push_to_hub is not None,
            role=role.card.role,
            step=role.step,
            base=settings.base_model or base_of(records, role.card),
            stop_token=str(role.chat.tokenizer.convert_ids_to_tokens(role.chat.stop_ids[0])),
            has_template=not role.chat.plain,
            has_head=role.head is not None and written.kind != "classifier",
            **vars(written),
        )
        write_card(partial, exported, records)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except Exception as error:
        check_room(error, target)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if settings.push_to_hub is not None:
        push(target, settings.push_to_hub, settings.private)
    return exported


def _check_adapter(settings: ExportSettings, role: OpenedRole) -> None:
    if settings.merge or not role.is_adapter:
        return
    if settings.dtype is not None:
        raise UserError("--dtype is that of a whole model, and this role is an adapter; add --merge, or leave it out.")
    if settings.push_to_hub is not None and not looks_like_hub_name(role.settings.model):
        raise UserError(
            f"this adapter names its base model {role.settings.model}, which others do not have; name it on the hub by "
            "--base_model USER/NAME, or add --merge."
        )


def _write_adapter(settings: ExportSettings, role: OpenedRole, folder: Path) -> _Written:
    """A PEFT folder, with a scalar head beside it if the role has one."""
    role.backbone.save_role(role.name, folder, public_card(role.card))
    if not settings.check:
        return _Written("adapter", "float32", None)
    sequences = check_sequences(role.chat, role.model.config)
    source = source_values(role, sequences, scores=False)
    role.release()
    values = exported_values(folder, sequences, role.settings, "adapter")
    return _Written("adapter", "float32", compare(values, source, source, scores=False))


def _write_whole(settings: ExportSettings, role: OpenedRole, folder: Path) -> _Written:
    """A Hugging Face folder: a causal language model, or a sequence classifier."""
    name = settings.dtype or "bfloat16"
    dtype, scores = getattr(torch, name), settings.merge and role.card.role == "reward"
    kind = "classifier" if scores else "model"
    if not settings.check:
        whole = whole_model(role, dtype, exact=False, classifier=scores)
        save_whole(whole, role, folder, dtype, settings.max_shard_size)
        return _Written(kind, name, None, whole.missing_bias)
    sequences = check_sequences(role.chat, role.model.config)
    source = source_values(role, sequences, scores)
    whole = whole_model(role, dtype, exact=True, classifier=scores)
    rounded = round_and_read(whole, source, sequences, dtype)
    save_whole(whole, role, folder, dtype, settings.max_shard_size)
    release_weights(whole.model)
    values = exported_values(folder, sequences, role.settings, kind) + whole.missing_bias
    return _Written(kind, name, compare(values, source, rounded, scores), whole.missing_bias)
