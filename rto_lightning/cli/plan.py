"""`rto-lightning plan`: what a stage would take of memory, before any weight is loaded.

The configuration is read as `fit` reads it. Roles of stages that have not run yet are replaced by what the settings say
they will be; of the base model only its `config.json` is read. Of several processes, which need not be there, the plan
is that of one, with what it communicates and computes.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from rto_lightning.cli.config_errors import ConfigurationError, check_config_files
from rto_lightning.cli.lightning_cli import RTOCLI, run
from rto_lightning.cli.stage import given_config_files
from rto_lightning.errors import MissingInputError, UserError

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
    config_files = given_config_files(options)
    check_config_files(config_files)
    with tempfile.TemporaryDirectory() as folder:
        PlanCLI.stand_ins = Path(folder)
        cli = run(options, config_files, PlanCLI)
        yield cli.model, cli.datamodule, cli.config.fit.trainer


def _own_options(args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options that `fit` does not have, and all others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--bandwidth_gb_s", type=float, default=DEFAULT_BANDWIDTH)
    try:
        own, rest = parser.parse_known_args(list(args))
    except argparse.ArgumentError as error:
        raise ConfigurationError(f"{error.argument_name}: {error.message}; give it a number.") from error
    if own.bandwidth_gb_s <= 0:
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

    device, precision = planned_device(str(trainer.accelerator)), str(trainer.precision or "32-true")
    on_gpu = device.type == "cuda"
    parallelism = memory.planned_parallelism(trainer, module, processes)
    spread = parallelism.processes > 1 or parallelism.sharded
    try:
        workload = memory.workload_of(module, data, precision, parallelism)
        plan = memory.plan_memory(workload, 0 if on_gpu else memory.resident_bytes(), foreach=on_gpu)
        costs = memory.plan_costs(workload, plan) if spread else None
    except UserError:
        raise
    except Exception as error:  # whatever code of models and libraries raises
        raise UserError(_no_plan(error)) from error
    available = None if on_gpu and not torch.cuda.is_available() else memory.available_bytes(device)
    if available is not None and not on_gpu:
        available //= parallelism.processes // parallelism.nodes  # one memory for all processes of a node
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


def _no_plan(error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return (
        f"this stage cannot be planned ({type(error).__name__}: {reason}); `rto-lightning fit` runs without a plan and "
        "writes the memory it took."
    )


def planned_device(accelerator: str) -> torch.device:
    """The device that `trainer.accelerator` means; it need not be there."""
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device({"gpu": "cuda", "cuda": "cuda", "mps": "mps"}.get(accelerator, "cpu"))


class PlanCLI(RTOCLI):
    """Builds module and data as `fit` does, but no trainer, and runs nothing."""

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

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """None: a plan needs no device."""
        return None  # type: ignore[return-value]

    def _run_subcommand(self, subcommand: str) -> None:
        pass


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
        (folder / "adapter_config.json").write_text(json.dumps(lora), encoding="utf-8")
    kind = "adapter" if settings.mode == "adapters" else "model"
    RoleCard(role, kind, settings.model, None, "", "").write(folder)
