"""What a finished stage was made from, in its `done.json`, and whether that is still what it would be made from."""

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rto_lightning.cli.pipeline_settings import PipelineSettings, StageSettings
from rto_lightning.errors import UserError
from rto_lightning.runs.files import written_whole
from rto_lightning.secrets import mask_settings

DONE_FILE = "done.json"
BEGUN_FILE = "begun.json"
"""What an unfinished stage is being made from, in its folder."""


def finished_stages(settings: PipelineSettings, output_dir: Path, base: Path) -> dict[str, dict[str, Any]]:
    """Reads the records of the stages that are done, and refuses those made from other inputs.

    All stages are compared before any is run, so that an hour of training does not end in a refusal.
    """
    records: dict[str, dict[str, Any]] = {}
    stale: dict[str, str] = {}
    for stage in settings.stages:
        record = _read_done(output_dir / stage.name)
        inputs = stage_inputs(stage, settings.seed, base, records)
        if record is None:
            continue
        if record["hash"] != _hash(inputs):
            stale[stage.name] = _difference(record["inputs"], inputs)
        else:
            records[stage.name] = record
    if stale:
        reasons = "; ".join(f"{name} ({difference})" for name, difference in stale.items())
        folders = " ".join(str(output_dir / name) for name in stale)
        raise UserError(
            f"these finished stages were made from other inputs: {reasons}; "
            f"remove {folders} to make them again, or choose another --output_dir."
        )
    return records


def stage_inputs(
    stage: StageSettings, seed: int, base: Path, records: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Everything that decides what a stage makes."""
    hashes = [hashlib.sha256((base / file).read_bytes()).hexdigest() for file in stage.files]
    config = hashes if len(hashes) > 1 else "".join(hashes) or None
    named = {}
    for name in stage.named_stages():
        record = records.get(name)
        named[name] = None if record is None else f"{record['hash']} of {record['finished']}"
    inputs = {"config": config, "run": stage.run, "arguments": stage.arguments, "seed": seed, "stages": named}
    masked: dict[str, Any] = mask_settings(json.loads(json.dumps(inputs, default=str)))
    return masked


def _hash(inputs: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Names what differs between the inputs of a finished stage and those it would have now."""
    changes = []
    if before["config"] != now["config"]:
        changes.append("its configuration file has changed")
    if before["run"] != now["run"]:
        changes.append(f"`run` was {before['run']}")
    keys = {**before["arguments"], **now["arguments"]}
    changed = [key for key in keys if before["arguments"].get(key) != now["arguments"].get(key)]
    if changed:
        changes.append("other arguments: " + ", ".join(changed))
    if before["seed"] != now["seed"]:
        changes.append(f"seed {before['seed']}, not {now['seed']}")
    newer = [n for n, made in now["stages"].items() if n in before["stages"] and before["stages"][n] != made]
    if newer:
        changes.append("from an earlier run of " + " and ".join(newer))
    return ", ".join(changes) or "the record differs"


def _read_done(folder: Path) -> dict[str, Any] | None:
    path = folder / DONE_FILE
    if not path.exists():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _ = record["hash"], record["inputs"]["stages"], record["seconds"], record["finished"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no record of a finished stage; remove {folder} to make it again.") from error
    return record


def write_done(folder: Path, inputs: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Record that a stage is done, from which inputs and in how many seconds; returns the record."""
    finished = datetime.now(UTC).isoformat(timespec="microseconds")
    record = {"hash": _hash(inputs), "inputs": inputs, "seconds": round(seconds, 1), "finished": finished}
    with written_whole(folder / DONE_FILE, "w", encoding="utf-8") as file:
        file.write(json.dumps(record, indent=2) + "\n")
    (folder / BEGUN_FILE).unlink(missing_ok=True)
    return record


def write_begun(folder: Path, inputs: dict[str, Any]) -> None:
    """Record that a stage has begun, and from which inputs."""
    with written_whole(folder / BEGUN_FILE, "w", encoding="utf-8") as file:
        file.write(json.dumps({"hash": _hash(inputs)}) + "\n")


def can_go_on(folder: Path, inputs: dict[str, Any]) -> bool:
    """Whether a stage was interrupted and would be made from the same inputs now."""
    path = folder / BEGUN_FILE
    try:
        return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["hash"] == _hash(inputs)
    except (ValueError, KeyError, TypeError):
        return False
