"""What a stage's folder holds, and what it says about its run: where it can go on, with which settings it began.

The folder of a stage is `trainer.default_root_dir`. It receives

    config.yaml         every setting of the run, ready for `rto-lightning fit --config`
    checkpoints/        what `--ckpt_path last` goes on from
    tensorboard/<run>/  events for `tensorboard --logdir`
    metrics/<run>/      the same figures as metrics.csv
    role/               the trained role, once training has ended
    memory.json         the peak memory that was planned, and what `fit` took
    predictions.jsonl   the answers of `predict`; on several devices `predictions.<rank>.jsonl`
    samples.jsonl       answers to fixed prompts over time, and samples.html, by the callback `LogSamples`
    nonfinite/          batches of steps in which something was NaN or infinite

where <run> is `fit`, or `fit-2` if an earlier run ended before its first step; likewise for the other commands. A run
that goes on keeps its config.yaml and adds to its own tensorboard/ and metrics/.
"""

import csv
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from rto_lightning.errors import UserError

ROLE_FOLDER = "role"
"""Name of the trained role inside a stage's folder."""

PREDICTIONS_FILE = "predictions.jsonl"
"""Name of the answers that `predict` writes into a stage's folder."""

MEMORY_FILE = "memory.json"
"""Name of the planned and measured peak memory in a stage's folder."""

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


def numbered_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints `step=N.ckpt` of a folder, by N; those of a `ModelCheckpoint` have other names."""
    steps = {path: re.fullmatch(r"step=(\d+)\.ckpt", path.name) for path in folder.glob("step=*.ckpt")}
    return sorted((path for path, match in steps.items() if match), key=lambda path: int(path.stem[len("step=") :]))


def last_checkpoint(root: Path) -> Path | None:
    """The checkpoint of a stage's folder that a run goes on from; None without one."""
    link = root / CHECKPOINTS / LAST
    if link.exists():
        return link.parent / os.readlink(link) if link.is_symlink() else link
    numbered = numbered_checkpoints(root / CHECKPOINTS)
    return numbered[-1] if numbered else None


def own_checkpoint(root: Path, path: str | Path | None) -> Path | None:
    """A checkpoint as it is named in a stage's folder; None if it is not in there."""
    folder = root / CHECKPOINTS
    if path is None or Path(path).absolute().parent.resolve() != folder.resolve():
        return None
    name = os.readlink(path) if Path(path).name == LAST and Path(path).is_symlink() else Path(path).name
    return folder / name


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


def config_files(root: Path, stem: str = "config") -> list[Path]:
    """The files of settings in a stage's folder, oldest first: `config.yaml`, `config-2.yaml` and so on."""
    names = (f"{stem}.yaml" if number == 1 else f"{stem}-{number}.yaml" for number in itertools.count(1))
    return list(itertools.takewhile(Path.is_file, (root / name for name in names)))


def check_same_settings(root: Path, text: str) -> None:
    """Compare settings with those that a run began with.

    Args:
        root: the stage's folder.
        text: the settings of the command as YAML.

    Raises:
        UserError: if they differ in what decides the result.
    """
    files = config_files(root)
    if not files:
        return
    path = files[-1]
    before, now = dict(_flat(yaml.safe_load(path.read_text(encoding="utf-8")))), dict(_flat(yaml.safe_load(text)))
    changed = [key for key in before if key in now and before[key] != now[key]]
    for one, other in ((before, now), (now, before)):  # null, and settings in its place
        changed += [key for key in one if key not in other and any(name.startswith(key + ".") for name in other)]
    changed = [key for key in changed if not _FREE.fullmatch(key)]
    if changed:
        told = "; ".join(f"{key} was {before.get(key, 'set')} and is {now.get(key, 'set')}" for key in changed[:5])
        more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise UserError(
            f"the run in {root} began with other settings ({path.name}: {told}{more}), with which it goes on; restore "
            "them, or let a new run go on from its checkpoint in another --trainer.default_root_dir with --ckpt_path "
            f"{last_checkpoint(root) or root / CHECKPOINTS / LAST}."
        )


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
