"""`rto-lightning plan`: what a stage would take of memory, before any weight is loaded.

The configuration is read as `fit` reads it. Roles of stages that have not run yet are replaced by what the settings say
they will be; of the base model only its `config.json` is read. Of several processes, which need not be there, the plan
is that of one, with what it communicates and computes.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rto_lightning.backbone.model_files import ADAPTER_CONFIG
from rto_lightning.cli.config_errors import ConfigurationError
from rto_lightning.cli.lightning_cli import run
from rto_lightning.cli.opening import ReadingCLI
from rto_lightning.cli.stage import checked_config_files
from rto_lightning.errors import MissingInputError, UserError, first_line

if TYPE_CHECKING:
    from rto_lightning.memory import CostPlan, MemoryPlan
    from rto_lightning.memory.workload import Workload

DEFAULT_BANDWIDTH = 50.0
"""GB/s: a link of 400 Gbit a GPU between nodes."""


def main(args: Sequence[str]) -> None:
    """Runs `rto-lightning plan` with these arguments: those of `fit`, `--json`, `--processes` and `--bandwidth_gb_s`.

    Raises:
        UserError: for every mistake that the user can cure.
    """
    own, rest = _own_options(args)
    with read_stage(rest) as stage:
        print(report(*stage, own.json, own.processes, own.bandwidth_gb_s), end="")


@contextmanager
def read_stage(args: Sequence[str]) -> Iterator[tuple[Any, Any, Any]]:
    """Module, data module and the settings of the trainer that options of `fit` mean.

    Within it, there are stand-ins in the place of roles that do not exist yet.

    Args:
        args: the options.

    Raises:
        UserError: for every mistake that the user can cure.
    """
    options = ["fit", *args]
    config_files = checked_config_files(options)
    with tempfile.TemporaryDirectory() as folder:
        PlanCLI.stand_ins = Path(folder)
        cli = run(options, config_files, PlanCLI)
        yield cli.model, cli.datamodule, cli.config.fit.trainer


def _own_options(args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options that `fit` does not have, and all others."""
    parser = argparse.ArgumentParser(
        prog="rto-lightning plan",
        usage="rto-lightning plan --config FILE.yaml [--json] [--processes N] [--bandwidth_gb_s X] [options of fit]",
        description="Print the memory that fit would take, before any weight is loaded. All options of fit are taken; "
        "`rto-lightning fit --help` lists them.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--json", action="store_true", help="print the plan for machines")
    parser.add_argument("--processes", type=int, metavar="N", help="spread it over N devices that need not be there")
    parser.add_argument(
        "--bandwidth_gb_s",
        type=float,
        default=DEFAULT_BANDWIDTH,
        metavar="X",
        help=f"GB that each device receives from others in a second ({DEFAULT_BANDWIDTH:g})",
    )
    try:
        own, rest = parser.parse_known_args(list(args))
    except argparse.ArgumentError as error:
        takes = "leave the value out" if error.argument_name == "--json" else "give it a number"
        raise ConfigurationError(f"{error.argument_name}: {error.message}; {takes}.") from error
    if not 0 < own.bandwidth_gb_s < math.inf:
        raise ConfigurationError(f"--bandwidth_gb_s is {own.bandwidth_gb_s}; set it above 0.")
    return own, rest


def report(
    module: Any,
    data: Any,
    trainer: Any,
    as_json: bool,
    processes: int | None = None,
    bandwidth: float = DEFAULT_BANDWIDTH,
) -> str:
    """The plan as a table, or as JSON with the available bytes and what each change would leave.

    Args:
        module: the stage.
        data: its data module.
        trainer: the settings of the trainer.
        as_json: which of the two.
        processes: over how many devices the stage is spread; None takes what the trainer's settings say.
        bandwidth: GB/s that a device receives from others.

    Raises:
        UserError: if there is no plan for such a stage or its models, or for such a strategy.
    """
    from rto_lightning import memory  # late, as it imports the models' libraries

    workload, plan, costs = _planned(module, data, trainer, processes)
    device, precision, parallelism = planned_device(str(trainer.accelerator)), workload.precision, workload.parallelism
    on_gpu = device.type == "cuda"
    is_there = not on_gpu or torch.cuda.is_available()
    available = memory.available_to_process(device, parallelism) if is_there else None
    fits = available is None or plan.peak <= available
    # Without the device nobody knows whether it fits, and the changes say how far one could get.
    changes = (
        []
        if fits and available is not None
        else memory.proposed_changes(plan, module, data, precision, on_gpu, parallelism)
    )
    if not as_json:
        table = memory.plan_table(plan, device.type, available, changes)
        return table if costs is None else f"{table}\n{memory.cost_table(costs, memory.Rates(bandwidth * 1e9))}"
    contents = {
        **plan.as_dict(),
        "device": device.type,
        "available": available,
        "changes": {change.setting: change.peak for change in changes},
        **(costs.as_dict() if costs is not None else {}),
    }
    return json.dumps(contents, indent=2) + "\n"


def plan_stage(args: Sequence[str]) -> "MemoryPlan":
    """The plan that `rto-lightning plan` prints, as data.

    Args:
        args: options of `fit`, such as `["--config", "rto.yaml", "--model.rollout.batch_size", "16"]`.

    Raises:
        UserError: for every mistake that the user can cure, and if there is no plan for such a stage or its models.
    """
    with read_stage(args) as (module, data, trainer):
        return _planned(module, data, trainer, None)[1]


def _planned(
    module: Any, data: Any, trainer: Any, processes: int | None
) -> "tuple[Workload, MemoryPlan, CostPlan | None]":
    """What a process does and takes, and what it communicates and computes if there are several."""
    from rto_lightning import memory

    on_gpu = planned_device(str(trainer.accelerator)).type == "cuda"
    parallelism = memory.planned_parallelism(trainer, module, processes)
    try:
        workload = memory.workload_of(module, data, str(trainer.precision or "32-true"), parallelism)
        plan = memory.plan_memory(workload, 0 if on_gpu else memory.resident_bytes(), foreach=on_gpu)
        spread = parallelism.processes > 1 or parallelism.sharded
        return workload, plan, memory.plan_costs(workload, plan) if spread else None
    except UserError:
        raise
    except Exception as error:  # whatever code of models and libraries raises
        raise UserError(_no_plan(error)) from error


def _no_plan(error: Exception) -> str:
    return (
        f"this stage cannot be planned ({type(error).__name__}: {first_line(error)}); `rto-lightning fit` runs without "
        "a plan and writes the memory it took."
    )


def planned_device(accelerator: str) -> torch.device:
    """The device that `trainer.accelerator` means; it need not be there."""
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device({"gpu": "cuda", "cuda": "cuda", "mps": "mps"}.get(accelerator, "cpu"))


class PlanCLI(ReadingCLI):
    """Builds module and data, whether the roles that they name are there or not."""

    stand_ins: Path
    """A folder for stand-ins of roles that are not there yet."""

    def before_instantiate_classes(self) -> None:
        """Put stand-ins in the place of roles that do not exist."""
        from rto_lightning.backbone.roles import role_folder

        model = self.config.fit.model.init_args
        settings = model.get("backbone")
        for place, key, role in _named_roles(model):
            try:
                role_folder(place[key], role)
            except MissingInputError:
                folder = self.stand_ins / str(len(list(self.stand_ins.iterdir())))
                _write_stand_in(folder, role, settings)
                place[key] = str(folder)


def _named_roles(model: Any) -> Iterator[tuple[Any, str, str]]:
    """(where, key, role) of every setting of a stage that may name the folder of a role."""
    roles = {"trained": "policy", "dpo": "dpo", "dpo_reference": "policy", "reward": "reward"}
    for key, role in roles.items():
        if model.get(key) is not None:
            yield model, key, role
    for place, key, role in ((model.get("backbone"), "init", "policy"), (model.get("critic"), "init", "reward")):
        if place is not None and place.get(key) not in (None, "reward", "policy"):
            yield place, key, role
    for source in model.get("more_rewards") or ():
        if source.get("reward") is not None:
            yield source, "reward", "reward"


def _write_stand_in(folder: Path, role: str, settings: Any) -> None:
    """What a run with these settings would save as a role, but for the weights."""
    from rto_lightning.backbone.roles import RoleCard

    folder.mkdir()
    if settings.mode == "adapters":
        lora = {"peft_type": "LORA", "r": settings.lora.rank, "target_modules": settings.lora.target_modules}
        (folder / ADAPTER_CONFIG).write_text(json.dumps(lora), encoding="utf-8")
    kind = "adapter" if settings.mode == "adapters" else "model"
    RoleCard(role, kind, settings.model, None, "", "").write(folder)
