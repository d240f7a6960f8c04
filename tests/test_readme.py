"""What the README names is there: files, commands, settings, and the choices of its tables."""

import inspect
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from jsonargparse import ArgumentParser, set_parsing_settings
from lightning.pytorch import LightningDataModule, Trainer

from rto_lightning import cli, data, modules
from rto_lightning.algorithms import Estimator, Granularity
from rto_lightning.cli.stage import STAGE_COMMANDS
from rto_lightning.modules import PreferenceModule, RTOModule, StageModule
from rto_lightning.modules.rto_settings import PPOSettings
from rto_lightning.rewards import WeightedReward
from tests.modules import stages

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = [
    match[1] or match[2] for match in re.finditer(r"^```\w*\n(.*?)^```$|`([^`\n]+)`", README, re.MULTILINE | re.DOTALL)
]
"""What stands in fences and between backticks."""
ROOTS = ("model", "data", "trainer", "backbone", "rollout", "rewards", "ppo", "critic", "reward_service")
SETTING = re.compile(rf"(?<![\w./-])(?:--)?((?:{'|'.join(ROOTS)})(?:\.[a-z_0-9]+)+)(?![\w/(])")
NO_SETTINGS = {"model.help", "data.help", "rewards.html", "rewards.parquet"}
"""What looks like one."""


def commands() -> list[str]:
    """All commands."""
    return [*STAGE_COMMANDS, *cli.OTHER_COMMANDS]


def table(heading: str) -> list[list[str]]:
    """The cells of the table whose first line begins so, without that line."""
    lines = README.splitlines()
    (first,) = (number for number, line in enumerate(lines) if line.startswith(f"| {heading}"))
    rows = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def exported(package: Any, base: type) -> Iterator[type]:
    return (kind for kind in vars(package).values() if inspect.isclass(kind) and issubclass(kind, base))


@cache
def settings() -> dict[str, str]:
    """Every setting of the stages and their data, as a dotted key, with what the help says of it."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # as the command does
    found: dict[str, str] = {}
    for prefix, package, base in (("model", modules, StageModule), ("data", data, LightningDataModule)):
        for kind in exported(package, base):
            if kind is not base:
                parser = ArgumentParser(exit_on_error=False)
                parser.add_class_arguments(kind, prefix, fail_untyped=False)
                found |= {action.dest: action.help or "" for action in parser._actions if action.dest != "help"}
    return found


def is_setting(key: str) -> bool:
    root, _, rest = key.partition(".")
    if root == "trainer":
        return rest.partition(".")[0] in inspect.signature(Trainer).parameters
    full = key.replace(".init_args", "") if root in ("model", "data") else f"model.{key}"
    # A group of settings is named like a setting; what an optimizer or a schedule takes is left to its class.
    within = re.match(r"model\.(\w*optimizer|\w*scheduler)\.\w+$", full)
    return full in settings() or any(name.startswith(f"{full}.") for name in settings()) or bool(within)


def test_every_setting_is_explained_by_the_help() -> None:
    assert {"model.rewards.beta_1", "model.ppo.kl_stop", "model.backbone.lora.rank", "data.train"} <= settings().keys()
    # Of a group the help lists the members.
    groups = {name for name in settings() for other in settings() if other.startswith(f"{name}.")}
    assert [name for name, text in settings().items() if len(text.split()) < 2 and name not in groups] == []


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?<![\w/])configs/[\w./-]+", README))))
def test_a_configuration_that_is_named_exists(path: str) -> None:
    assert (ROOT / path.rstrip(".")).exists()


def test_overlays_are_listed() -> None:
    folder = ""
    listed: dict[str, list[str]] = {}
    for cells in table("overlays |"):
        folder = cells[0].strip("`") or folder
        if "<" not in folder:
            listed[folder] = [*listed.get(folder, []), *(name for name in names(cells[2]) if "/" not in name)]
    assert set(listed) == {"configs/method/", "configs/precision/", "configs/strategy/"}
    for folder, found in listed.items():
        assert sorted(found) == sorted(path.stem for path in (ROOT / folder).iterdir())


def test_losses_granularities_and_estimators_are_those_of_the_code() -> None:
    losses = get_args(get_type_hints(PreferenceModule.__init__)["loss"])
    for heading, choices in (
        ("`PreferenceModule`: `model.loss`", losses),
        ("`RTOModule`: `model.rewards.granularity`", get_args(Granularity)),
        ("`RTOModule`: `model.ppo.estimator`", get_args(Estimator)),
    ):
        assert [name for cells in table(heading) for name in names(cells[0])] == list(choices)
    for cells in table("`RTOModule`: `model.ppo.estimator`"):
        critic = {"yes": True, "none": False}[cells[2]]
        assert [PPOSettings(estimator=name).has_critic for name in names(cells[0])] == [critic] * len(names(cells[0]))


def test_stages_are_those_of_the_code() -> None:
    saved = {names(cells[1])[0]: names(cells[3])[0] for cells in table("stage | module")}
    kinds = [kind for kind in exported(modules, StageModule) if kind is not StageModule]
    assert saved == {kind.__name__: kind.saved_as for kind in kinds}


def test_options_are_settings_of_rto() -> None:
    for cells in table("option | setting"):
        named = names(cells[1])
        assert named
        for name in named:
            if name.startswith("more_rewards"):
                assert set(re.findall(r"(\w+): ", name)) - {"more_rewards"} <= get_type_hints(WeightedReward).keys()
            elif name in ("sequence", "token"):
                assert name in get_args(get_type_hints(PPOSettings)["aggregation"])
            else:
                assert f"model.{name}" in settings() or name in inspect.signature(RTOModule).parameters


def test_a_setting_that_is_named_is_one() -> None:
    keys = {match[1] for code in CODE for match in SETTING.finditer(code)}
    assert {"rewards.truncation_penalty", "data.batch_size", "trainer.default_root_dir"} <= keys
    assert {key for key in keys if not is_setting(key)} == NO_SETTINGS


def test_the_example_of_extending_trains(tiny_model: Path, tmp_path: Path) -> None:
    example = re.search(r"<!-- example: extending -->\n```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert example is not None
    names: dict[str, Any] = {"__name__": "my_stages"}
    exec(example[1], names)
    rows = [{"prompt": f"Question {n}?", "chosen": "yes!", "rejected": "no"} for n in range(4)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files = {"preferences": str(source), "prompts": str(source)}

    hinge = names["HingeModule"](stages.settings(tiny_model), beta=0.5, optimizer=stages.adam)
    stages.fit(hinge, stages.preferences(files), tmp_path, steps=1)
    assert float(hinge.trainer.callback_metrics["train/loss"]) == pytest.approx(1.0), "of equal policies"
    counting = stages.rto(tiny_model, kind=names["CountingRTO"])
    stages.fit(counting, stages.prompts(files), tmp_path, steps=2)
    assert counting.engine.sampled == 4 + 2 * (4 + 4), "scores are normalised; two epochs train and validate"


def test_commands_are_those_of_the_code() -> None:
    known = commands()
    named = {match for code in CODE for match in re.findall(r"(?:rto-lightning|-m rto_lightning) ([a-z][a-z-]*)", code)}
    assert named <= set(known)
    explained = re.findall(r"^  ([a-z][a-z-]+) ", cli.USAGE, re.MULTILINE)
    assert sorted(explained) == sorted(known)
    assert set(known) - set(STAGE_COMMANDS) <= named


@pytest.mark.parametrize("command", [name for name in commands() if name not in (*STAGE_COMMANDS, "plan")])
def test_options_of_a_command_are_in_its_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    known = capsys.readouterr().out
    lines = [line for code in CODE for line in code.replace("\\\n", " ").splitlines()]
    calls = [line.partition(f"rto-lightning {command} ")[2] for line in lines if f"rto-lightning {command} " in line]
    assert calls
    for option in {option for call in calls for option in re.findall(r"(?<!\S)--[a-z_]+", call)}:
        assert re.search(rf"{option}\b", known), option
