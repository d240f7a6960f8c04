"""Runs a list of stages in order, each in a folder of its own, and skips what is done.

A pipeline is a YAML file:

    output_dir: outputs/quickstart      # relative to the working directory
    seed: 1                             # every stage gets it
    stages:
      - name: world                     # also the stage's folder, <output_dir>/world
        run: rto_lightning.quickstart.world:write_world
      - name: sft
        fit: sft.yaml                   # relative to this file; runs `rto-lightning fit --config sft.yaml`
        arguments:                      # settings that override those of the file
          model.backbone.model: "{world}/model"

`{name}` in an argument stands for the folder of an earlier stage, and `{name}/role` for the role it trained.
A `run` stage calls `function(output_dir=..., seed=..., **arguments)`; its folder exists and is empty.

A finished stage leaves `done.json` with what it was made from. Each later run compares: the same inputs skip
the stage, other inputs are an error that says what differs, and a folder without `done.json` was interrupted:
it is moved aside and the stage begins anew. A stage's inputs include those of the stages it names, and when
these ran.
"""

import argparse
import dataclasses
import gc
import hashlib
import importlib
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import yaml

from rto_lightning.cli import run_stage
from rto_lightning.config_errors import ConfigurationError, check_config_files, explain
from rto_lightning.errors import UserError

DONE_FILE = "done.json"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
# `{name}`, but not the `{{ name }}` of a Jinja template
_PLACEHOLDER = re.compile(r"(?<!\{)\{([A-Za-z0-9][A-Za-z0-9_-]*)\}(?!\})")


@dataclass(frozen=True)
class StageSettings:
    """One entry of `stages`."""

    name: str
    """Name of the stage and of its folder."""
    fit: str | None = None
    """Configuration of the stage to train, relative to the pipeline file."""
    run: str | None = None
    """Function to call instead, as `module:function`."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Overrides of the configuration (dotted keys), or arguments of the function."""

    def named_stages(self) -> list[str]:
        """The stages that the arguments name, in order of appearance."""
        return list(dict.fromkeys(_PLACEHOLDER.findall(json.dumps(self.arguments, default=str))))


@dataclass(frozen=True)
class PipelineSettings:
    """A pipeline file."""

    stages: tuple[StageSettings, ...]
    """What to run, in order."""
    output_dir: str = "outputs/pipeline"
    """Folder of all stages, relative to the working directory."""
    seed: int = 1
    """Seed of every stage."""


@dataclass(frozen=True)
class StageResult:
    """A line of the closing table."""

    name: str
    seconds: float
    state: str
    """`done now` or `done before`."""


def main(args: Sequence[str]) -> None:
    """Runs `rto-lightning pipeline` with these arguments.

    Raises:
        UserError: For every mistake that the user can cure.
    """
    parser = _Parser(prog="rto-lightning pipeline", description="Run the stages of a pipeline file in order.")
    parser.add_argument("-c", "--config", required=True, metavar="FILE.yaml", help="the pipeline file")
    parser.add_argument("--output_dir", metavar="DIR", help="folder of all stages, instead of the file's")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of every stage, instead of the file's")
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="STAGE.KEY=VALUE",
        help="arguments of stages, e.g. --set dpo.trainer.max_steps=20 rto.data.batch_size=8",
    )
    options = parser.parse_args(args)
    settings = load_pipeline(options.config)
    if options.output_dir is not None:
        settings = dataclasses.replace(settings, output_dir=options.output_dir)
    if options.seed is not None:
        settings = dataclasses.replace(settings, seed=options.seed)
    settings = override_arguments(settings, options.set)
    run_pipeline(settings, options.config)


def load_pipeline(path: str | Path) -> PipelineSettings:
    """Reads a pipeline file.

    Raises:
        ConfigurationError: If it is missing, is not YAML, or has unknown, missing or ill-typed keys.
    """
    check_config_files([str(path)])
    content = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    _check_keys(content, PipelineSettings, f"{path}: ")
    entries = content.pop("stages")
    if not entries:
        raise ConfigurationError(f"{path}: `stages` is empty; give at least one stage.")
    stages: list[StageSettings] = []
    for number, entry in enumerate(entries, start=1):
        where = f"{path}: stage {number}"
        if not isinstance(entry, dict):
            raise ConfigurationError(f"{where} must be a mapping with `name` and `fit` or `run`, not {entry!r}.")
        if isinstance(entry.get("name"), str):
            where += f" ({entry['name']})"
        _check_keys(entry, StageSettings, f"{where}: ")
        stage = StageSettings(**{**entry, "arguments": entry.get("arguments") or {}})
        _check_stage(stage, stages, Path(path), where)
        stages.append(stage)
    return PipelineSettings(stages=tuple(stages), **content)


def override_arguments(settings: PipelineSettings, overrides: Sequence[str]) -> PipelineSettings:
    """Puts `stage.key=value` strings into the arguments of the stages.

    Raises:
        ConfigurationError: If one has another form or names no stage.
    """
    stages = {stage.name: stage for stage in settings.stages}
    for override in overrides:
        key, equals, text = override.partition("=")
        name, dot, argument = key.partition(".")
        if not (equals and dot and argument):
            raise ConfigurationError(f"--set {override}: must have the form STAGE.KEY=VALUE.")
        if name not in stages:
            raise ConfigurationError(f"--set {override}: there is no stage `{name}`; stages: {', '.join(stages)}.")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError:
            value = text
        if _PLACEHOLDER.search(text):
            value = text  # `{sft}` alone would be a YAML mapping
        stages[name] = dataclasses.replace(stages[name], arguments={**stages[name].arguments, argument: value})
    for position, stage in enumerate(stages.values()):
        _check_named_stages(stage, list(stages)[:position], f"--set: stage {stage.name}")
    return dataclasses.replace(settings, stages=tuple(stages.values()))


def run_pipeline(settings: PipelineSettings, path: str | Path) -> list[StageResult]:
    """Runs the stages that are not done, and prints a table.

    Args:
        settings: What to run.
        path: The pipeline file, to which the stages' configurations are relative.

    Returns:
        A line for each stage.

    Raises:
        UserError: If a finished stage was made from other inputs, or a stage fails by the user's mistake.
    """
    output_dir = Path(settings.output_dir).resolve()
    base = Path(path).parent
    records = _finished_stages(settings, output_dir, base)
    output_dir.mkdir(parents=True, exist_ok=True)
    results: list[StageResult] = []
    for number, stage in enumerate(settings.stages, start=1):
        title = f"[{number}/{len(settings.stages)}] {stage.name}"
        if stage.name in records:
            seconds = records[stage.name]["seconds"]
            print(f"{title}: done before ({seconds:.0f} s), skipped", flush=True)
            results.append(StageResult(stage.name, seconds, "done before"))
            continue
        what = f"fit {base / stage.fit}" if stage.fit is not None else f"run {stage.run}"
        folder = output_dir / stage.name
        moved = _move_aside(folder)
        if moved is not None:
            print(f"{title}: was interrupted; its folder is now {moved.name}", flush=True)
        print(f"{title}: {what} -> {folder}", flush=True)
        inputs = _inputs(stage, settings.seed, base, records)
        started = time.monotonic()
        try:
            _run(stage, settings, output_dir, base)
        except UserError as error:
            kind = ConfigurationError if isinstance(error, ConfigurationError) else UserError
            raise kind(f"stage {stage.name}: {error}") from error
        seconds = time.monotonic() - started
        records[stage.name] = _write_done(folder, inputs, seconds)
        results.append(StageResult(stage.name, seconds, "done now"))
        _free_memory()
    print(format_results(results), flush=True)
    return results


def format_results(results: Sequence[StageResult]) -> str:
    """The closing table: stage, seconds and state, with the sum of what ran now."""
    width = max(len("stage"), *(len(result.name) for result in results))
    lines = ["", f"{'stage':<{width}}  seconds  state"]
    lines += [f"{result.name:<{width}}  {result.seconds:7.1f}  {result.state}" for result in results]
    now = sum(result.seconds for result in results if result.state == "done now")
    return "\n".join([*lines, f"{'now':<{width}}  {now:7.1f}"])


def _finished_stages(settings: PipelineSettings, output_dir: Path, base: Path) -> dict[str, dict[str, Any]]:
    """Reads the records of the stages that are done, and refuses those made from other inputs.

    All stages are compared before any is run, so that an hour of training does not end in a refusal.
    """
    records: dict[str, dict[str, Any]] = {}
    stale: dict[str, str] = {}
    for stage in settings.stages:
        record = _read_done(output_dir / stage.name)
        inputs = _inputs(stage, settings.seed, base, records)
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


def _inputs(stage: StageSettings, seed: int, base: Path, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Everything that decides what a stage makes."""
    config = None if stage.fit is None else hashlib.sha256((base / stage.fit).read_bytes()).hexdigest()
    named = {}
    for name in stage.named_stages():
        record = records.get(name)
        named[name] = None if record is None else f"{record['hash']} of {record['finished']}"
    inputs = {"config": config, "run": stage.run, "arguments": stage.arguments, "seed": seed, "stages": named}
    return json.loads(json.dumps(inputs, default=str))


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
        record = json.loads(path.read_text(encoding="utf-8"))
        _ = record["hash"], record["inputs"]["stages"], record["seconds"], record["finished"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no record of a finished stage; remove {folder} to make it again.") from error
    return record


def _write_done(folder: Path, inputs: dict[str, Any], seconds: float) -> dict[str, Any]:
    finished = datetime.now(UTC).isoformat(timespec="microseconds")
    record = {"hash": _hash(inputs), "inputs": inputs, "seconds": round(seconds, 1), "finished": finished}
    partial = folder / (DONE_FILE + ".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    partial.rename(folder / DONE_FILE)
    return record


def _move_aside(folder: Path) -> Path | None:
    if not folder.exists():
        return None
    number = 1
    while (target := folder.with_name(f"{folder.name}.interrupted-{number}")).exists():
        number += 1
    return folder.rename(target)


def _run(stage: StageSettings, settings: PipelineSettings, output_dir: Path, base: Path) -> None:
    folder = output_dir / stage.name
    folders = {other.name: str(output_dir / other.name) for other in settings.stages}
    arguments = {key: _fill(value, folders) for key, value in stage.arguments.items()}
    folder.mkdir()
    if stage.fit is None:
        assert stage.run is not None
        _call(stage.run, folder, settings.seed, arguments)
        return
    options = [f"--{key}={_as_option(value)}" for key, value in arguments.items()]
    fixed = [f"--trainer.default_root_dir={folder}", f"--seed_everything={settings.seed}"]
    run_stage(["fit", "--config", str(base / stage.fit), *fixed, *options])
    if not (folder / "role").is_dir():
        raise UserError(f"training ended without a role in {folder / 'role'}; see its log for the reason.")


def _call(target: str, folder: Path, seed: int, arguments: Mapping[str, Any]) -> None:
    """Calls `module:function` with arguments checked against, and converted to, its annotations."""
    from jsonargparse import ArgumentParser

    function = _import_function(target)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(function, skip={"output_dir", "seed"}, fail_untyped=False)
    nested: dict[str, Any] = {}
    for key, value in arguments.items():
        *parents, last = key.split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    try:
        parsed = parser.instantiate(parser.parse_object(nested))
    except argparse.ArgumentError as error:
        accepted = list(parser.get_defaults(skip_validation=True).keys())
        raise ConfigurationError(f"arguments of {target}: {explain(str(error), (), accepted)}") from error
    function(output_dir=folder, seed=seed, **parsed.as_dict())


def _import_function(target: str) -> Any:
    module_name, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module_name), name)
    except AttributeError as error:
        raise ConfigurationError(f"`run: {target}`: the module {module_name} has no function {name}.") from error
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ConfigurationError(f"`run: {target}`: there is no module {error.name}.") from error
        raise


def _fill(value: Any, folders: Mapping[str, str]) -> Any:
    """Replaces `{name}` by the stage's folder, in strings at any depth."""
    if isinstance(value, str):
        return _PLACEHOLDER.sub(lambda match: folders[match[1]], value)
    if isinstance(value, list):
        return [_fill(item, folders) for item in value]
    if isinstance(value, dict):
        return {key: _fill(item, folders) for key, item in value.items()}
    return value


def _as_option(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _free_memory() -> None:
    """Gives back what the finished stage held: reference cycles keep models alive until a collection."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check_keys(content: Mapping[str, Any], settings: type, where: str) -> None:
    """Checks the keys of a mapping, and the types of their values, against a settings dataclass."""
    kinds = {
        "stages": (list, "a list"),
        "arguments": (dict, "a mapping"),
        "seed": (int, "a whole number"),
    }
    fields = {item.name: item for item in dataclasses.fields(settings)}
    for key, value in content.items():
        if key not in fields:
            raise ConfigurationError(f"{where}unknown key `{key}`; known: {', '.join(fields)}.")
        kind, words = kinds.get(key, (str, "a text"))
        if value is None and key in ("arguments", "fit", "run"):
            continue
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ConfigurationError(f"{where}`{key}` must be {words}, not {value!r}.")
    for name, item in fields.items():
        optional = item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING
        if name not in content and not optional:
            raise ConfigurationError(f"{where}the key `{name}` is missing.")


def _check_stage(stage: StageSettings, earlier: Sequence[StageSettings], path: Path, where: str) -> None:
    names = [other.name for other in earlier]
    if not _NAME.fullmatch(stage.name):
        raise ConfigurationError(f"{where}: `name` may hold letters, digits, - and _ only, as it names a folder.")
    if stage.name in names:
        raise ConfigurationError(f"{where}: an earlier stage has the same name; names must differ.")
    if (stage.fit is None) == (stage.run is None):
        raise ConfigurationError(f"{where}: give either `fit` (a configuration file) or `run` (module:function).")
    if stage.fit is not None and not (path.parent / stage.fit).is_file():
        raise ConfigurationError(f"{where}: the file {path.parent / stage.fit} of `fit` does not exist.")
    if stage.run is not None and not all(stage.run.partition(":")):
        raise ConfigurationError(f"{where}: `run` must have the form module:function, not {stage.run}.")
    _check_named_stages(stage, names, where)


def _check_named_stages(stage: StageSettings, earlier: Sequence[str], where: str) -> None:
    for key, value in stage.arguments.items():
        for name in _PLACEHOLDER.findall(json.dumps(value, default=str)):
            if name not in earlier:
                known = ", ".join(earlier) or "none"
                raise ConfigurationError(f"{where}: `{key}` names {{{name}}}, no earlier stage (earlier: {known}).")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}; `{self.prog} --help` lists the options.")


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-4` is a number, as in the stages' configurations (PyYAML wants `1.0e-4`)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)
