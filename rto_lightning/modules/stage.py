"""What the stages share: the backbone, the optimizer, what a checkpoint holds and the saved role."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from rto_lightning.backbone import BackboneSettings, ChatTokenizer, PolicyBackbone, RoleCard, load_chat_tokenizer
from rto_lightning.backbone.fingerprints import adapter_fingerprint
from rto_lightning.backbone.roles import check_init, role_folder
from rto_lightning.data.order import processed_batches
from rto_lightning.errors import UserError
from rto_lightning.modules.numerics import NumericsGuard, NumericsSettings
from rto_lightning.optimizers import build_optimizer, check_optimizer, check_shardable
from rto_lightning.parallel import rank, ranks, sum_gradients
from rto_lightning.seeding import run_seed, seed_generators
from rto_lightning.strategies import FullyShardedStrategy, check_strategy

PRECISIONS = ("32-true", "bf16-mixed", "64-true")


class StageModule(LightningModule):
    """Base class of the stages.

    A stage trains one role, `trained_role`, on the shared backbone and saves it under the name `saved_as`.
    Checkpoints hold the trained weights and the optimizer state, never the frozen base.

    Args:
        backbone: The base model and its adapters.
        trained: Saved role of this stage to test, to predict with, or to train further.
        optimizer: Optimizer of the trained role.
        lr_scheduler: Learning-rate schedule, stepped after each optimizer step.
        numerics: What happens when something is NaN or infinite.
    """

    stage_name: str
    trained_role = "policy"
    saved_as = "policy"
    backbone: PolicyBackbone

    def __init__(
        self,
        backbone: BackboneSettings,
        trained: str | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        numerics: NumericsSettings = NumericsSettings(),
    ) -> None:
        super().__init__()
        self.guard = NumericsGuard(numerics)
        self.settings = backbone
        self.trained = trained
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.strict_loading = False
        if backbone.init is not None:
            check_init(backbone)
        if trained is not None:
            self._check_trained(role_folder(trained, self.saved_as, self.stage_name))

    def _check_trained(self, folder: Path | None) -> None:
        """Refuse a reward role where a policy is trained further, and anything else where a reward role is."""
        card = RoleCard.read(folder) if folder is not None else None
        if card is not None and "reward" in (self.saved_as, card.role):
            card.check_kind(self.saved_as, str(self.trained))

    @property
    def saved_role(self) -> str:
        """The role whose weights are saved: the trained one."""
        return self.trained_role

    @cached_property
    def chat(self) -> ChatTokenizer:
        """The tokenizer of the base model, which the data modules use too."""
        return load_chat_tokenizer(self.settings)

    def setup(self, stage: str) -> None:
        """Refuse a precision that would round the trained weights, and strategies and optimizers that do not work.

        Raises:
            UserError: if `trainer.precision` is not one of `32-true`, `bf16-mixed` and `64-true`; if the strategy
                cannot run a stage; in training also if an optimizer cannot take a step on the device.
        """
        self.guard.restore([])  # a checkpoint, which is read later, knows better
        check_strategy(self.trainer.strategy)
        precision = str(self.trainer.precision)
        if precision not in PRECISIONS:
            raise UserError(
                f"trainer.precision {precision} does not go with RLHF training because trained weights need float32 "
                "masters and both optimizers the same scale; use 32-true or bf16-mixed, and "
                "model.backbone.dtype bfloat16 to hold frozen weights in 16 bits."
            )
        if stage == "fit":
            for key, make in self.named_optimizers().items():
                check_optimizer(make, key, self.trainer.strategy.root_device, self.settings.trained_dtype)
                if self.is_sharded and self.settings.mode == "full":
                    check_shardable(make, key)

    def named_optimizers(self) -> dict[str, OptimizerCallable]:
        """What makes each optimizer of the stage, by its key in a configuration."""
        return {"model.optimizer": self.optimizer}

    def configure_model(self) -> None:
        """Load the base model and add the roles, once; then spread them over ranks, if the strategy does."""
        if not hasattr(self, "backbone"):
            self.backbone = PolicyBackbone(self.settings, self.chat, self._device_of_trainer())
            self.add_roles()
        self.add_roles_of_task()
        self.shard_roles()

    def add_roles(self) -> None:
        """Add the roles of the stage; by default the trained one."""
        self.add_policy()

    def add_roles_of_task(self) -> None:
        """Add roles that only the trainer's present task needs and that are not there yet; by default none."""

    def shard_roles(self) -> None:
        """Spread models that are not spread yet, under a strategy that asks for it."""
        if self.is_sharded:
            strategy: Any = self.trainer.strategy
            precision, by_hand = str(self.trainer.precision), not self.automatic_optimization
            self.backbone.shard(strategy.sharding(precision, self.settings.mode, sum_gradients=by_hand))

    def add_reference(self) -> None:
        """Add the frozen role `reference`: the base model or the SFT adapter `init` on it."""
        self.backbone.add_role("reference", self.settings.init)

    def add_policy(self, scalar_head: bool = False) -> None:
        """Add the trained role, which starts as `trained`, else as `init`, else as the base model."""
        start = self.trained or self.settings.init
        self.backbone.add_role(self.trained_role, start, trainable=True, scalar_head=scalar_head)

    def configure_optimizers(self) -> Any:
        """The optimizer of the trained role and its schedule."""
        optimizer = build_optimizer(self.optimizer, self.backbone.trained_parameters(self.trained_role))
        if self.lr_scheduler is None:
            return optimizer
        schedule = {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backward within the trained role: gradient checkpointing computes activations again as whoever is active."""
        with self.backbone.play(self.trained_role):
            loss.backward(*args, **kwargs)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Average the gradients of weights that stay whole on every rank beside a sharded model."""
        if self.automatic_optimization and self.is_sharded:
            sum_gradients(self.backbone.trained_parameters(self.trained_role), mean=True)

    def guarded(self, loss: Tensor, batch: Any, tensors: Mapping[str, Tensor]) -> Tensor:
        """The loss of a training batch for Lightning to train on; see :meth:`NumericsGuard.watch`."""
        if self._trainer is None:
            self.guard.watched.clear()  # no step will
        return self.guard.watch(batch, loss, tensors)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does; leave a step without gradients, so that it moves nothing, if it must not be taken."""
        if self.guard.watched_passes(self):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            optimizer.zero_grad(set_to_none=True)
        self.log_skipped_steps()

    def log_skipped_steps(self) -> None:
        """Log their number, once there are any."""
        if self.guard.skipped_steps:
            self.log("train/skipped_steps", float(self.guard.skipped_steps), batch_size=1)

    def on_validation_end(self) -> None:
        """Warn of metrics that are not finite."""
        self._warn_of_metrics("validation")

    def on_test_end(self) -> None:
        """Warn of metrics that are not finite."""
        self._warn_of_metrics("test")

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: only RTO answers prompts.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"the {self.stage_name} stage has no predict; give its role to the RTO stage as --model.trained."
        )

    def kept_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: trained weights and buffers of the stage, as they are."""
        trained = {id(weight) for role in self.backbone.roles for weight in self.backbone.trained_parameters(role)}
        kept: dict[str, Tensor] = {name: weight for name, weight in self.named_parameters() if id(weight) in trained}
        return kept | {name: value for name, value in self.named_buffers() if not name.startswith("backbone.")}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep trained weights and buffers of the stage only."""
        kept, weights = self.kept_tensors(), checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: weights[name] for name in weights if name in kept}
        if skipped := self.guard.state():
            checkpoint["skipped_steps"] = skipped

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting the steps that were left out."""
        self.guard.restore(checkpoint.get("skipped_steps", []))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the global generators for this batch: nothing here draws from them, a user's function may."""
        seed_generators(run_seed(None), processed_batches(self.trainer), rank())

    def log_mean(self, name: str, value: Tensor, weight: int, shown: bool = False) -> None:
        """Log a mean of this rank's batch; what appears is the mean over ranks and, per epoch, over batches.

        Args:
            name: `train/...`, `validation/...` or `test/...`.
            value: scalar.
            weight: of the batch in an epoch's mean, such as its rows.
            shown: also on the progress bar.
        """
        self.log(name, value.detach(), prog_bar=shown, batch_size=weight, sync_dist=ranks() > 1)

    def finish(self) -> None:
        """What is left to do between the last step and the saving of the role; a run killed there does it again."""

    def save_role(self, folder: Path) -> None:
        """Write the trained role as a PEFT or Hugging Face folder with a `role.json`; every rank has to call it.

        Raises:
            UserError: if the folder exists and is not empty.
        """
        self.backbone.save_role(self.saved_role, folder, self.role_card())

    def role_card(self) -> RoleCard:
        """What `role.json` will say."""
        card = self.backbone.card(self.saved_role, self.saved_as, self.role_settings())
        card.init_fingerprint = self.init_fingerprint
        return card

    @property
    def init_fingerprint(self) -> str | None:
        """Tells apart what `reference` is: the adapter `init`, or None for the base model."""
        return adapter_fingerprint(Path(self.settings.init)) if self.settings.init is not None else None

    def role_settings(self) -> dict[str, Any]:
        """What a reader of the saved role must know about its training."""
        return {}

    @property
    def is_sharded(self) -> bool:
        """Whether the strategy spreads models over ranks."""
        return self._trainer is not None and isinstance(self.trainer.strategy, FullyShardedStrategy)

    def _warn_of_metrics(self, split: str) -> None:
        metrics = self.trainer.callback_metrics.items()
        if bad := [name for name, value in metrics if name.startswith(f"{split}/") and not value.isfinite()]:
            rank_zero_warn(f"after step {self.global_step} these metrics are NaN or infinite: {', '.join(bad)}.")

    @property
    def _datamodule(self) -> Any:
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is None:
            raise UserError(f"{self.stage_name} needs a data module; pass one to the trainer as `datamodule`.")
        return datamodule

    def _first_epoch(self) -> Iterable[Any]:
        """Batches to measure something on, from the first one of a run on."""
        data = self._datamodule
        batches: Iterable[Any] = getattr(data, "first_epoch", data.train_dataloader)()
        return batches

    def _device_of_trainer(self) -> torch.device | None:
        return self._trainer.strategy.root_device if self._trainer is not None else None
