"""Runs a list of stages in order, each in a folder of its own, and skips what is done.

A finished stage leaves `done.json` with what it was made from. Each later run compares: the same inputs skip
the stage, other inputs are an error that says what differs. A folder without `done.json` was interrupted: training
goes on from its last checkpoint if it would be made from the same inputs; else the folder is moved aside and the stage
begins anew, as one that calls a function always does. A stage's inputs include those of the stages it names, and when
these ran.
"""

import argparse
import dataclasses
import gc
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rto_lightning.cli.config_errors import CommandParser, ConfigurationError, explain
from rto_lightning.cli.pipeline_records import can_go_on, finished_stages, stage_inputs, write_begun, write_done
from rto_lightning.cli.pipeline_settings import (
    PLACEHOLDER,
    PipelineSettings,
    StageSettings,
    load_pipeline,
    overlay_stages,
    override_arguments,
)
from rto_lightning.cli.stage import check_stage, run_stage
from rto_lightning.errors import UserError
from rto_lightning.runs.folder import ROLE_FOLDER, last_checkpoint

REPORT_FILE = "report.html"
"""Name of the report in the folder of all stages."""
DONE_NOW, DONE_BEFORE = "done now", "done before"


@dataclass(frozen=True)
class StageResult:
    """A line of the closing table."""

    name: str
    seconds: float
    state: str
    """`DONE_NOW` or `DONE_BEFORE`."""


def main(args: Sequence[str]) -> None:
    """Runs `rto-lightning pipeline` with these arguments.

    Raises:
        UserError: For every mistake that the user can cure.
    """
    parser = CommandParser(prog="rto-lightning pipeline", description="Run the stages of a pipeline file in order.")
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
    parser.add_argument(
        "--overlay",
        action="extend",
        nargs="+",
        default=[],
        metavar="FILE.yaml",
        help="configurations on top of those of every stage that is trained, such as configs/precision/qlora_nf4.yaml",
    )
    options = parser.parse_args(args)
    settings = load_pipeline(options.config)
    if options.output_dir is not None:
        settings = dataclasses.replace(settings, output_dir=options.output_dir)
    if options.seed is not None:
        settings = dataclasses.replace(settings, seed=options.seed)
    settings = overlay_stages(override_arguments(settings, options.set), options.overlay)
    run_pipeline(settings, options.config)


def run_pipeline(settings: PipelineSettings, path: str | Path) -> list[StageResult]:
    """Runs the stages that are not done, and prints a table.

    Args:
        settings: What to run.
        path: The pipeline file, to which the stages' configurations are relative.

    Returns:
        A line for each stage.

    Raises:
        UserError: If a finished stage was made from other inputs, or a stage fails by the user's mistake; before any
            stage runs, if the settings of one are none that it takes.
    """
    output_dir = Path(settings.output_dir).resolve()
    base = Path(path).parent
    records = finished_stages(settings, output_dir, base)
    for stage in settings.stages:
        if stage.name not in records:
            with _naming(stage):
                _check(stage, settings, output_dir, base)
    output_dir.mkdir(parents=True, exist_ok=True)
    results: list[StageResult] = []
    for number, stage in enumerate(settings.stages, start=1):
        title = f"[{number}/{len(settings.stages)}] {stage.name}"
        if stage.name in records:
            seconds = records[stage.name]["seconds"]
            print(f"{title}: done before ({seconds:.0f} s), skipped", flush=True)
            results.append(StageResult(stage.name, seconds, DONE_BEFORE))
            continue
        what = f"run {stage.run}" if stage.fit is None else f"fit {' '.join(str(base / file) for file in stage.files)}"
        folder = output_dir / stage.name
        inputs = stage_inputs(stage, settings.seed, base, records)
        goes_on = stage.fit is not None and can_go_on(folder, inputs)
        if goes_on:
            print(f"{title}: was interrupted, and goes on", flush=True)
        elif (moved := _move_aside(folder)) is not None:
            print(f"{title}: was interrupted; its folder is now {moved.name}", flush=True)
        print(f"{title}: {what} -> {folder}", flush=True)
        folder.mkdir(exist_ok=goes_on)
        if stage.fit is not None:
            write_begun(folder, inputs)
        started = time.monotonic()
        with _naming(stage):
            _run(stage, settings, output_dir, base)
        seconds = time.monotonic() - started
        records[stage.name] = write_done(folder, inputs, seconds)
        results.append(StageResult(stage.name, seconds, DONE_NOW))
        _free_memory()
    print(format_results(results), flush=True)
    report = output_dir / REPORT_FILE
    if not report.exists() or any(result.state == DONE_NOW for result in results):
        _report(report, settings, path, results)
    print(f"report: {report}", flush=True)
    return results


def _report(report: Path, settings: PipelineSettings, path: str | Path, results: Sequence[StageResult]) -> None:
    """Writes the page on what the stages have come to."""
    from rto_lightning.report import ReportedStage, write_report

    stages = [
        ReportedStage(stage.name, stage.description, result.seconds, report.parent / stage.name)
        for stage, result in zip(settings.stages, results, strict=True)
    ]
    facts = {
        "pipeline": Path(path).name,
        "seed": str(settings.seed),
        "finished": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "stages": f"{len(results)}, {sum(result.seconds for result in results):.0f} s",
        "rto-lightning": version("rto-lightning"),
    }
    write_report(report, f"Report of {report.parent.name}", facts, stages)


def format_results(results: Sequence[StageResult]) -> str:
    """The closing table: stage, seconds and state, with the sum of what ran now."""
    width = max(len("stage"), *(len(result.name) for result in results))
    lines = ["", f"{'stage':<{width}}  seconds  state"]
    lines += [f"{result.name:<{width}}  {result.seconds:7.1f}  {result.state}" for result in results]
    now = sum(result.seconds for result in results if result.state == DONE_NOW)
    return "\n".join([*lines, f"{'now':<{width}}  {now:7.1f}"])


def _move_aside(folder: Path) -> Path | None:
    if not folder.exists():
        return None
    number = 1
    while (target := folder.with_name(f"{folder.name}.interrupted-{number}")).exists():
        number += 1
    return folder.rename(target)


@contextmanager
def _naming(stage: StageSettings) -> Iterator[None]:
    """Says of an error which stage it is of."""
    try:
        yield
    except UserError as error:
        told = UserError(f"stage {stage.name}: {error}")
        told.exit_status = error.exit_status
        raise told from error


def _arguments(stage: StageSettings, settings: PipelineSettings, output_dir: Path) -> dict[str, Any]:
    """Those of a stage, with the folders of the others in the place of their names."""
    folders = {other.name: str(output_dir / other.name) for other in settings.stages}
    return {key: _fill(value, folders) for key, value in stage.arguments.items()}


def _options(stage: StageSettings, settings: PipelineSettings, output_dir: Path, base: Path) -> list[str]:
    """What follows `rto-lightning` on a command line that trains the stage."""
    options = [f"--{key}={_as_option(value)}" for key, value in _arguments(stage, settings, output_dir).items()]
    fixed = [f"--trainer.default_root_dir={output_dir / stage.name}", f"--seed_everything={settings.seed}"]
    return ["fit", *(f"--config={base / file}" for file in stage.files), *fixed, *options]


def _check(stage: StageSettings, settings: PipelineSettings, output_dir: Path, base: Path) -> None:
    """Raise a ConfigurationError for settings that the stage does not take."""
    if stage.run is not None:
        _parsed(stage.run, _arguments(stage, settings, output_dir))
    else:
        check_stage(_options(stage, settings, output_dir, base))


def _run(stage: StageSettings, settings: PipelineSettings, output_dir: Path, base: Path) -> None:
    folder = output_dir / stage.name
    if stage.run is not None:
        function, arguments = _parsed(stage.run, _arguments(stage, settings, output_dir))
        function(output_dir=folder, seed=settings.seed, **arguments)
        return
    resume = [] if last_checkpoint(folder) is None else ["--ckpt_path=last"]
    run_stage([*_options(stage, settings, output_dir, base), *resume], of_pipeline=True)
    if not (folder / ROLE_FOLDER).is_dir():
        raise UserError(f"training ended without a role in {folder / ROLE_FOLDER}; see its log for the reason.")


def _parsed(target: str, arguments: Mapping[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """`module:function` and its arguments, checked against, and converted to, its annotations."""
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
    return function, parsed.as_dict()


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
        return PLACEHOLDER.sub(lambda match: folders[match[1]], value)
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
