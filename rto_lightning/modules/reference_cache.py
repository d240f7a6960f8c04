"""Where the preference stage takes cached log-probabilities of its reference from, and when it cannot."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer

from rto_lightning.backbone import PolicyBackbone
from rto_lightning.backbone.logprob_cache import weights_hash
from rto_lightning.data import PreferenceDataModule
from rto_lightning.errors import UserError
from rto_lightning.modules.pair_logprobs import PairLogprobs, cached_pair_logprobs
from rto_lightning.modules.stage import StageModule


def check_cacheable(trainer: Trainer) -> None:
    """Refuse a cache for what cannot have one.

    Raises:
        UserError: on several devices, without a data module of preferences, or if that streams its rows.
    """
    if trainer.world_size > 1:
        raise UserError(
            "model.reference_cache is made on one device in this version; set trainer.devices to 1 or it to null."
        )
    data = getattr(trainer, "datamodule", None)
    if isinstance(data, PreferenceDataModule) and data.streaming:
        raise UserError(
            "model.reference_cache must know all pairs at the start, and data.streaming reads them while training; set "
            "one of them to null or false."
        )
    if not isinstance(data, PreferenceDataModule):
        raise UserError(
            "model.reference_cache must know all pairs at the start; give the trainer a PreferenceDataModule, or set "
            "the cache to null."
        )


def cached_reference(stage: StageModule, folder: str, splits: Sequence[str]) -> dict[str, PairLogprobs]:
    """Log-probabilities of the pairs of each split under the reference, read from a folder or computed.

    If the backbone of the stage has no role `reference`, a copy of the model is loaded for it and dropped again.

    Args:
        stage: runs in a trainer with a `PreferenceDataModule` that is set up.
        folder: where the files are.
        splits: of `train`, `validation` and `test`; one that the data lacks, or that is not validated on, is left out.
    """
    trainer: Any = stage.trainer
    data, precision, bar = trainer.datamodule, trainer.precision_plugin, trainer.progress_bar_callback
    rows = {split: data.rows[split] for split in splits if split in data.rows}
    if trainer.limit_val_batches == 0:
        rows.pop("validation", None)
    backbone = stage.backbone
    if "reference" not in backbone.roles:
        backbone = PolicyBackbone(stage.settings, stage.chat, stage.device)
        backbone.add_role("reference", stage.settings.init)
        backbone = precision.convert_module(backbone).to(stage.device)
    weights = weights_hash(backbone, "reference")
    shown = bar is not None and getattr(bar, "is_enabled", True)
    with precision.forward_context():  # as in a training step
        return {
            split: cached_pair_logprobs(
                backbone, "reference", pairs, folder, data.eval_batch_size, progress=shown, weights=weights
            )
            for split, pairs in rows.items()
        }
