"""What a stage's folder says about its run: where it can go on, and with which settings it began."""

import csv
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from rto_lightning.errors import UserError

CHECKPOINTS = "checkpoints"
"""Name of the folder of checkpoints inside a stage's folder."""

LAST = "last.ckpt"
"""Name of the link to the checkpoint that was saved last."""

# What may change when a run goes on: how long it lasts, where it computes and what it shows.
_FREE = re.compile(
    r"ckpt_path|weights_only"
    r"|trainer\.(accelerator|(strategy|plugins|profiler|logger|callbacks)(\..*)?|devices|num_nodes|benchmark|default_root_dir"
    r"|(min|max)_(steps|epochs|time)|limit_val_batches|val_check_interval|check_val_every_n_epoch|num_sanity_val_steps"
    r"|log_every_n_steps|enable_\w+|inference_mode|detect_anomaly|barebones)"
    r"|data\.init_args\.(validation|test|predict|eval_batch_size|max_eval_rows|num_workers|tokenize_workers)"
    r"|model\.init_args\.(ppo\.(microbatch_size|scoring_batch_size)|rollout\.(batch_size|gather_weights|vllm\..*)"
    r"|backbone\.(gradient_checkpointing|logprob_chunk_tokens)|reference_cache|reward_url|reward_service\..*|numerics\..*)"
)


def checkpoint_name(step: int) -> str:
    """Name of the checkpoint after so many optimizer steps (for RTO: iterations)."""
    return f"step={step}.ckpt"


def last_checkpoint(root: Path) -> Path | None:
    """The checkpoint of a stage's folder that a run goes on from; None without one."""
    link = root / CHECKPOINTS / LAST
    if link.exists():
        return link.parent / link.resolve().name if link.is_symlink() else link
    numbered = {path: re.fullmatch(r"step=(\d+)\.ckpt", path.name) for path in (root / CHECKPOINTS).glob("step=*.ckpt")}
    steps = {int(match[1]): path for path, match in numbered.items() if match}
    return steps[max(steps)] if steps else None


def checkpoint_to_resume(root: Path) -> Path | None:
    """Where `--ckpt_path last` goes on; None in a new run.

    A run saves its first checkpoint before its first step, so that one with metrics and no checkpoint has lost it.

    Raises:
        UserError: if there is no checkpoint of a run that had begun.
    """
    found = last_checkpoint(root)
    if found is None and any(_has_rows(path) for path in root.glob("metrics/fit*/metrics.csv")):
        raise UserError(
            f"{root} holds a run that has begun, and {root / CHECKPOINTS} no checkpoint of it; name one by --ckpt_path "
            "FILE, or begin anew in another --trainer.default_root_dir."
        )
    return found


def config_in_use(root: Path) -> Path | None:
    """The file with the settings of the run of a folder: the newest of `config.yaml`, `config-2.yaml` and so on."""
    found = None
    for path in (root / ("config.yaml" if number == 1 else f"config-{number}.yaml") for number in range(1, 10_000)):
        if not path.is_file():
            break
        found = path
    return found


def check_same_settings(root: Path, text: str) -> None:
    """Compare settings with those that a run began with.

    Args:
        root: the stage's folder.
        text: the settings of the command as YAML.

    Raises:
        UserError: if they differ in what decides the result.
    """
    path = config_in_use(root)
    if path is None:
        return
    before, now = dict(_flat(yaml.safe_load(path.read_text(encoding="utf-8")))), dict(_flat(yaml.safe_load(text)))
    changed = [key for key in before if key in now and before[key] != now[key] and not _FREE.fullmatch(key)]
    if changed:
        told = "; ".join(f"{key} was {before[key]} and is {now[key]}" for key in changed[:5])
        more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise UserError(
            f"the run in {root} began with other settings ({path.name}: {told}{more}), with which it goes on; restore "
            "them, or let a new run go on from its checkpoint in another --trainer.default_root_dir with --ckpt_path "
            f"{last_checkpoint(root) or root / CHECKPOINTS / LAST}."
        )


def lasts_as_long(root: Path, text: str) -> bool:
    """Whether settings, as YAML, ask for a run as long as the one of a stage's folder."""
    path = config_in_use(root)
    if path is None:
        return False
    before, now = (yaml.safe_load(settings)["trainer"] for settings in (path.read_text(encoding="utf-8"), text))
    return all(before[key] == now[key] for key in ("max_steps", "max_epochs", "max_time"))


def _has_rows(path: Path) -> bool:
    with path.open(encoding="utf-8", newline="") as file:
        return any("train" in key and value for row in csv.DictReader(file) for key, value in row.items())


def _flat(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; an empty dictionary has none."""
    if not isinstance(settings, Mapping):
        yield prefix, settings
        return
    for key, value in settings.items():
        yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
