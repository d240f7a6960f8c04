"""How a stage is spread over processes: read from the trainer's settings, or from a strategy at work."""

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from rto_lightning.errors import UserError
from rto_lightning.strategies import FullyShardedStrategy, resolve_strategy

Sharing = Literal["none", "ddp", "fsdp"]
"""Whether processes copy the weights (`ddp`) or share them (`fsdp`, which is FSDP2)."""

_SHARING: dict[type, Sharing] = {DDPStrategy: "ddp", FullyShardedStrategy: "fsdp", SingleDeviceStrategy: "none"}


@dataclass(frozen=True)
class Parallelism:
    """A number of processes with a device each, and what they share."""

    sharing: Sharing = "none"
    """What the strategy does with the weights."""
    processes: int = 1
    """Devices over all nodes."""
    nodes: int = 1
    """Machines that they are in."""
    gathers_for_rollout: bool = True
    """Whether `fsdp` has every weight of the policy on each device while it samples; else one layer at a time."""
    offloads: bool = False
    """Whether `fsdp` keeps its shards, their gradients and optimizer states in the memory of the host."""

    @property
    def sharded(self) -> bool:
        """Whether a process holds its shares of models, and gathers them to compute."""
        return self.sharing == "fsdp"

    def share(self, rows: int, setting: str) -> int:
        """Rows of a global batch that each process takes.

        Args:
            rows: of the batch.
            setting: what sets them, for the error.

        Raises:
            UserError: if they cannot be shared equally.
        """
        if rows % self.processes:
            raise UserError(
                f"{setting} {rows} counts rows over all devices and is not divisible by the {self.processes} "
                f"processes; set it to a multiple of {self.processes}."
            )
        return rows // self.processes


ONE_PROCESS = Parallelism()


def planned_parallelism(trainer: Any, module: Any, processes: int | None = None) -> Parallelism:
    """What the settings of a trainer mean, on machines that need not be there.

    Args:
        trainer: settings with `strategy`, `devices`, `num_nodes` and `accelerator`.
        module: the stage.
        processes: devices over all nodes, in the place of `devices` times `num_nodes`; None takes those.

    Raises:
        UserError: for a strategy or a number of devices that no stage runs on.
    """
    nodes = int(trainer.num_nodes)
    if processes is None:
        processes = _devices(trainer.devices, str(trainer.accelerator)) * nodes
    if processes < 1 or processes % nodes:
        raise UserError(f"{processes} processes do not spread over {nodes} node(s); set --processes to a multiple.")
    strategy = resolve_strategy(trainer.strategy)
    if isinstance(strategy, str):
        sharing: Sharing = "none" if strategy == "auto" and processes == 1 else "ddp"
        return _parallelism(sharing, False, processes, nodes, module)
    path = getattr(strategy, "class_path", None)
    kind = type(strategy) if path is None else _class(path)
    options = getattr(strategy, "init_args", None) or {}
    offloads = options.get("cpu_offload", False) or getattr(strategy, "cpu_offload", False)
    return _parallelism(_sharing(kind), bool(offloads), processes, nodes, module)


def running_parallelism(trainer: Any, module: Any) -> Parallelism:
    """What a trainer at work does.

    Args:
        trainer: the trainer.
        module: the stage.

    Raises:
        UserError: for a strategy that no stage runs on.
    """
    strategy = trainer.strategy
    offloads = bool(getattr(strategy, "cpu_offload", False))
    return _parallelism(_sharing(type(strategy)), offloads, trainer.world_size, trainer.num_nodes, module)


def _parallelism(sharing: Sharing, offloads: bool, processes: int, nodes: int, module: Any) -> Parallelism:
    gathers = getattr(getattr(module, "rollout_settings", None), "gather_weights", True)
    return Parallelism(sharing, processes, nodes, bool(gathers), offloads)


def _sharing(kind: type) -> Sharing:
    for known, sharing in _SHARING.items():
        if issubclass(kind, known):
            return sharing
    raise UserError(f"the strategy {kind.__name__} does not run the stages here; set trainer.strategy to ddp or fsdp.")


def _class(path: str) -> type:
    found: Any = None
    try:
        found = resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"trainer.strategy {path} cannot be imported ({error}); set it to ddp or fsdp.") from error
    return found if isinstance(found, type) else type(found)


def _devices(devices: Any, accelerator: str) -> int:
    """Devices of a node; `auto` and -1 are those that are there, or one."""
    if isinstance(devices, list | tuple):
        return len(devices)
    text = str(devices)
    if text in ("auto", "-1"):
        return max(1, torch.cuda.device_count()) if accelerator in ("auto", "gpu", "cuda") else 1
    return len([part for part in text.split(",") if part.strip()]) if "," in text else int(text)
