"""The pipeline file: a list of stages, and what may stand in it.

    output_dir: outputs/quickstart      # relative to the working directory
    seed: 1                             # every stage gets it
    stages:
      - name: world                     # also the stage's folder, <output_dir>/world
        run: rto_lightning.quickstart.world:write_world
      - name: sft
        fit: sft.yaml                   # relative to this file; runs `rto-lightning fit --config sft.yaml`
                                        # [sft.yaml, overlay.yaml] gives several, of which the later one wins
        arguments:                      # settings that override those of the file
          model.backbone.model: "{world}/model"

`{name}` in an argument stands for the folder of an earlier stage, and `{name}/role` for the role it trained.
A `run` stage calls `function(output_dir=..., seed=..., **arguments)`; its folder exists and is empty.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rto_lightning.cli.config_errors import ConfigurationError, check_config_files

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
# `{name}`, but not the `{{ name }}` of a Jinja template
PLACEHOLDER = re.compile(r"(?<!\{)\{([A-Za-z0-9][A-Za-z0-9_-]*)\}(?!\})")


@dataclass(frozen=True)
class StageSettings:
    """One entry of `stages`."""

    name: str
    """Name of the stage and of its folder."""
    fit: str | list[str] | None = None
    """Configuration of the stage to train, or several that overlay each other, relative to the pipeline file."""
    run: str | None = None
    """Function to call instead, as `module:function`."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Overrides of the configuration (dotted keys), or arguments of the function."""

    @property
    def files(self) -> list[str]:
        """The configurations of `fit`, in their order; none for `run`."""
        return [self.fit] if isinstance(self.fit, str) else list(self.fit or [])

    @property
    def description(self) -> str:
        """What it does, as it stands in the pipeline file."""
        return f"run {self.run}" if self.fit is None else f"fit {' '.join(self.files)}"

    def named_stages(self) -> list[str]:
        """The stages that the arguments name, in order of appearance."""
        return list(dict.fromkeys(PLACEHOLDER.findall(json.dumps(self.arguments, default=str))))


@dataclass(frozen=True)
class PipelineSettings:
    """A pipeline file."""

    stages: tuple[StageSettings, ...]
    """What to run, in order."""
    output_dir: str = "outputs/pipeline"
    """Folder of all stages, relative to the working directory."""
    seed: int = 1
    """Seed of every stage."""


def load_pipeline(path: str | Path) -> PipelineSettings:
    """Reads a pipeline file.

    Raises:
        ConfigurationError: If it is missing, is not YAML, or has unknown, missing or ill-typed keys.
    """
    check_config_files([str(path)])
    content = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    if "model" in content and "stages" not in content:
        raise ConfigurationError(f"{path} is of one stage; run it by `rto-lightning fit --config {path}`.")
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
        if PLACEHOLDER.search(text):
            value = text  # `{sft}` alone would be a YAML mapping
        stages[name] = dataclasses.replace(stages[name], arguments={**stages[name].arguments, argument: value})
    for position, stage in enumerate(stages.values()):
        _check_named_stages(stage, list(stages)[:position], f"--set: stage {stage.name}")
    return dataclasses.replace(settings, stages=tuple(stages.values()))


def overlay_stages(settings: PipelineSettings, files: Sequence[str]) -> PipelineSettings:
    """Puts configurations, relative to the working directory, on top of those of every stage that is trained.

    Raises:
        ConfigurationError: If one is missing or is not YAML.
    """
    check_config_files(files)
    over = [str(Path(file).resolve()) for file in files]
    stages = (
        stage if stage.fit is None else dataclasses.replace(stage, fit=[*stage.files, *over])
        for stage in settings.stages
    )
    return dataclasses.replace(settings, stages=tuple(stages)) if over else settings


def _check_keys(content: Mapping[str, Any], settings: type, where: str) -> None:
    """Checks the keys of a mapping, and the types of their values, against a settings dataclass."""
    kinds: dict[str, tuple[Any, str]] = {
        "stages": (list, "a list"),
        "arguments": (dict, "a mapping"),
        "fit": ((str, list), "a file or a list of files"),
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
    if stage.fit is not None and not stage.files:
        raise ConfigurationError(f"{where}: `fit` is an empty list; give at least one file.")
    for name in stage.files:
        if not isinstance(name, str) or not (path.parent / name).is_file():
            raise ConfigurationError(f"{where}: the file {path.parent / str(name)} of `fit` does not exist.")
    if stage.run is not None and not all(stage.run.partition(":")):
        raise ConfigurationError(f"{where}: `run` must have the form module:function, not {stage.run}.")
    _check_named_stages(stage, names, where)


def _check_named_stages(stage: StageSettings, earlier: Sequence[str], where: str) -> None:
    for key, value in stage.arguments.items():
        for name in PLACEHOLDER.findall(json.dumps(value, default=str)):
            if name not in earlier:
                known = ", ".join(earlier) or "none"
                raise ConfigurationError(f"{where}: `{key}` names {{{name}}}, no earlier stage (earlier: {known}).")


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no annotations
    """YAML in which `1e-4` is a number, as in the stages' configurations (PyYAML wants `1.0e-4`)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)
