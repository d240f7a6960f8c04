"""Which of Lightning's strategies a stage runs on, and fully sharded training as it is done here (FSDP2)."""

import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from rto_lightning.backbone.shard_files import load_shards, read_index
from rto_lightning.backbone.sharding import Sharding
from rto_lightning.errors import UserError
from rto_lightning.runs.checkpoint_files import METADATA_FILE
from rto_lightning.runs.files import PARTIAL, remove, sync_folder

_SHARDED = ("fsdp", "fsdp2", "model_parallel")
_SHARDED_OFFLOADED = ("fsdp_cpu_offload", "fsdp_offload")
_REPLICATED = ("ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true")


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2: every decoder layer's weights are spread over all ranks and gathered when they are needed.

    In mode `adapters` the frozen base is spread; adapters, heads, their gradients and optimizer states are small and
    stay whole on every rank, and checkpoints are single files as those of one device. In mode `full` weights, gradients
    and optimizer states are spread, and each rank writes its part of a checkpoint, a folder, which any number of ranks
    can resume from.

    Args:
        cpu_offload: Keep the shards, and the optimizer step, on the host.
        save_distributed_checkpoint: In mode `full`; false assembles one file on rank 0, which needs the memory for it.
        process_group_backend: Of `torch.distributed`; null takes that of the device.
        timeout: Of a collective operation.
    """

    def __init__(
        self,
        cpu_offload: bool = False,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        if cpu_offload and process_group_backend is None and torch.cuda.is_available():
            process_group_backend = "cpu:gloo,cuda:nccl"  # offloaded gradients are reduced on the host too
        super().__init__("auto", 1, save_distributed_checkpoint, process_group_backend, timeout)
        self.cpu_offload = cpu_offload

    @property
    def offloads(self) -> bool:
        """Whether shards are kept on the host and computed with elsewhere."""
        return self.cpu_offload and self.root_device.type != "cpu"

    def setup_environment(self) -> None:
        """Makes one group of all ranks."""
        assert self.cluster_environment is not None
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def sharding(self, precision: str, mode: str, sum_gradients: bool) -> Sharding:
        """How a stage spreads its models.

        Args:
            precision: `trainer.precision`.
            mode: `model.backbone.mode`.
            sum_gradients: as :attr:`Sharding.sum_gradients`.
        """
        dtype = torch.bfloat16 if precision == "bf16-mixed" and mode == "full" else None
        return Sharding(self.device_mesh["data_parallel"], dtype, self.offloads, sum_gradients)

    def setup(self, trainer: Trainer) -> None:
        """Sets the models up; weights that were gathered in inference mode could not be trained."""
        validation = trainer.fit_loop.epoch_loop.val_loop
        for loop in (validation, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Moves what is whole, and makes it equal on all ranks; offloaded shards stay on the host."""
        assert self.model is not None
        if not self.offloads:
            super().model_to_device()
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if not isinstance(tensor, DTensor):
                tensor.data = tensor.data.to(self.root_device)
        for weight in self.model.parameters():
            if weight.requires_grad and not isinstance(weight, DTensor):
                torch.distributed.broadcast(weight.data, 0)

    # Checkpoints: tensors that are whole are written as on one device.

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning hands the optimizer states of a checkpoint over, as on one device."""
        return not self._holds_shards

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights of the module; the stage keeps those that it trains."""
        assert self.lightning_module is not None
        if self._holds_shards and not self._save_distributed_checkpoint:
            return super().lightning_module_state_dict()
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of an optimizer."""
        if not self._holds_shards:
            return ParallelStrategy.optimizer_state(self, optimizer)
        assert self.model is not None
        plain: Optimizer = getattr(optimizer, "_optimizer", optimizer)
        fresh, whole = not plain.state, not self._save_distributed_checkpoint
        options = StateDictOptions(full_state_dict=whole, cpu_offload=True)
        state: dict[str, Any] = get_optimizer_state_dict(self.model, plain, options=options)
        if fresh:  # torch took a step at learning rate 0 to have a state to write, which must not count
            for of_weight in (*plain.state.values(), *state.get("state", {}).values()):
                if "step" in of_weight:
                    of_weight["step"].zero_()
        return _renamed(state, {name: n for n, name in enumerate(self._names(plain))}) if whole and state else state

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Loads whole weights; shards were loaded with the checkpoint."""
        if not self._holds_shards:
            ParallelStrategy.load_model_state_dict(self, checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """The same for optimizers."""
        if not self._holds_shards:
            ParallelStrategy.load_optimizer_state_dict(self, checkpoint)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes a folder, to which every rank adds its shards, or a file."""
        if self._holds_shards and self._save_distributed_checkpoint:
            place = Path(self.broadcast(filepath))
            partial = place.with_name(place.name + PARTIAL)
            if self.is_global_zero and partial.exists():
                shutil.rmtree(partial)  # left by a run that was killed
            self.barrier("save_checkpoint")
            super().save_checkpoint(checkpoint, partial, storage_options)
            self.barrier("save_checkpoint")
            if self.is_global_zero:
                if place.exists():
                    remove(place)
                partial.replace(place)
                sync_folder(place.parent)
        elif self._holds_shards:
            super().save_checkpoint(checkpoint, filepath, storage_options)
        elif self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads either.

        Raises:
            UserError: for a folder of shards in mode `adapters`.
        """
        path = Path(self.broadcast(checkpoint_path))
        if not self._holds_shards:
            if path.is_dir():
                raise UserError(f"{path} was saved in mode full; set model.backbone.mode to full to resume from it.")
            return ParallelStrategy.load_checkpoint(self, path, weights_only)
        assert self.lightning_module is not None and self.model is not None
        if not path.is_dir():
            return self._load_file(path, weights_only)
        metadata: dict[str, Any] = torch.load(
            path / METADATA_FILE, map_location="cpu", weights_only=weights_only is not False
        )
        states: dict[str, Any] = {"state_dict": self.lightning_module.state_dict()}
        self.lightning_module.on_save_checkpoint(states)  # keeps what a checkpoint holds
        states |= {
            f"optimizer_{number}": get_optimizer_state_dict(self.model, optimizer)
            for number, optimizer in enumerate(self.optimizers)
        }
        stored = read_index(path).state_dict_metadata
        for name in states["state_dict"]:
            if f"state_dict.{name}" not in stored:
                raise UserError(f"the checkpoint {path} lacks {name}; resume with the settings that it was saved with.")
        load_shards(states, path)  # into the module's own weights
        for number, optimizer in enumerate(self.optimizers):
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=states[f"optimizer_{number}"])
        return metadata | {"state_dict": states["state_dict"]}

    def _load_file(self, path: Path, weights_only: bool | None) -> dict[str, Any]:
        """Spreads what a file holds whole, as one device or DDP write it."""
        assert self.model is not None
        checkpoint = ParallelStrategy.load_checkpoint(self, path, weights_only)
        whole = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(self.model, dict(checkpoint["state_dict"]), options=whole)
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            named = _renamed(state, dict(enumerate(self._names(optimizer))))
            if named["state"]:
                set_optimizer_state_dict(self.model, optimizer, optim_state_dict=named, options=whole)
            else:  # it has made no step; torch would make one, at learning rate 0, which counts
                for group, saved in zip(optimizer.param_groups, named["param_groups"], strict=True):
                    group.update({key: value for key, value in saved.items() if key != "params"})
        return checkpoint

    def _names(self, optimizer: Optimizer) -> list[str]:
        """Names of the weights of an optimizer, in the order in which a file numbers them."""
        assert self.model is not None
        names = {id(weight): name for name, weight in self.model.named_parameters()}
        return [names[id(weight)] for group in optimizer.param_groups for weight in group["params"]]

    @property
    def _holds_shards(self) -> bool:
        """Whether weights that are trained are spread."""
        assert self.model is not None
        return any(isinstance(weight, DTensor) and weight.requires_grad for weight in self.model.parameters())


def _renamed(state: dict[str, Any], names: Mapping[Any, Any]) -> dict[str, Any]:
    """The state dict of an optimizer with other names, or numbers, for its weights."""
    groups = [{**group, "params": [names[key] for key in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[key]: value for key, value in state["state"].items()}, "param_groups": groups}


def resolve_strategy(strategy: Any) -> Any:
    """What the trainer gets for `trainer.strategy`: `fsdp` is FSDP2 here.

    Args:
        strategy: a name or an object.

    Raises:
        UserError: for a name on which no stage can run.
    """
    if not isinstance(strategy, str) or strategy == "auto" or strategy in _REPLICATED:
        return strategy
    if strategy in _SHARDED or strategy in _SHARDED_OFFLOADED:
        return FullyShardedStrategy(cpu_offload=strategy in _SHARDED_OFFLOADED)
    raise UserError(
        f"trainer.strategy {strategy} does not run the stages here, which keep several roles on one model; set it to "
        "auto (one device), ddp (a copy of the model on each) or fsdp (FSDP2, a part of it on each)."
    )


def check_strategy(strategy: Strategy) -> None:
    """Refuse a strategy on which no stage can run.

    Raises:
        UserError: if it is none of one device, DDP and FSDP2.
    """
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | FullyShardedStrategy):
        raise UserError(
            f"the strategy {type(strategy).__name__} does not run the stages here, which keep several roles on one "
            "model; set trainer.strategy to ddp or fsdp, or to rto_lightning.strategies.FullyShardedStrategy."
        )


def check_processes(strategy: Strategy) -> None:
    """Refuse more processes on a machine than the trainer has devices there.

    Raises:
        UserError: in the processes that are left without one.
    """
    environment = getattr(strategy, "cluster_environment", None)
    if not isinstance(strategy, ParallelStrategy) or environment is None or strategy.parallel_devices is None:
        return
    process, devices = environment.local_rank(), len(strategy.parallel_devices)
    if process >= devices:
        raise UserError(
            f"process {process} of this machine has no device, since trainer.devices gives {devices}; set "
            "trainer.devices to the number of processes that are started on a machine."
        )


def check_checkpoint(strategy: Strategy, path: Any) -> None:
    """Raise UserError for a folder of shards, which only FSDP2 reads."""
    if path and Path(path).is_dir() and not isinstance(strategy, FullyShardedStrategy):
        raise UserError(
            f"the checkpoint {path} is a folder of shards; set trainer.strategy to fsdp, with trainer.devices 1 for "
            "one device."
        )


def local_gradients(strategy: Strategy) -> AbstractContextManager[None]:
    """Within it, DDP leaves gradients as each rank computes them, for whoever adds them up afterwards."""
    return strategy.block_backward_sync() if isinstance(strategy, DDPStrategy) else nullcontext()
