"""The commands of cells, their records and locks; nothing is trained here."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rto_lightning.cli.lightning_cli import RTOCLI
from tests.benchmarks.cells import OPTIONS, online_arguments, preference_arguments
from tests.benchmarks.plan import Cell
from tests.benchmarks.preparation import Preparation
from tests.benchmarks.protocol import CONFIGS, FULL, METHODS, PREFERENCE_TITLES, with_preference_methods
from tests.benchmarks.records import finite, last_metric, read_cells, read_curves, read_json, write_json
from tests.benchmarks.workers import claim, lock, open_cells


def parsed(arguments: list[str]) -> dict[str, str]:
    """Options of a command by name."""
    assert arguments[:2] == ["fit", "--config"]
    return dict(argument.removeprefix("--").split("=", 1) for argument in arguments[3:])


def test_every_setting_of_every_method_has_an_option() -> None:
    used = {name for method in METHODS for row in method.tried for name in {**method.fixed, **row}}
    used |= {name for row in (*FULL.shared, *FULL.sweep) for name in row}
    assert used == set(OPTIONS)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_all_methods_sample_equally_many_responses(method: Any, tmp_path: Path) -> None:
    for row in method.tried:
        cell = Cell("requirement", 5, method.name, {**method.fixed, **FULL.shared[0], **row}, FULL.iterations)
        options = parsed(online_arguments(cell, FULL, Preparation(tmp_path, "requirement", 5), tmp_path / "cell"))
        prompts = int(options["data.batch_size"])
        assert prompts * int(options.get("model.rollout.responses_per_prompt", 1)) == FULL.responses
        assert options["trainer.max_steps"] == "40" and options["seed_everything"] == "5"
        assert json.loads(options["trainer.callbacks"])[0]["init_args"] == {"gold": "requirement"}
        lr = "init_args.lr"
        rates = [float(options[f"model.{role}_optimizer.{lr}"]) for role in ("policy", "critic")]
        assert rates == [FULL.shared[0]["lr"]] * 2
        # Only methods with token rewards load the DPO role.
        assert ("model.dpo" in options) == (float(options["model.rewards.beta_1"]) != 0)


def test_the_command_knows_every_option(tmp_path: Path) -> None:
    settings = {
        "lr": 0.002,
        "beta_1": 0.7,
        "beta_2": 0.6,
        "token_reward_clip": 0.5,
        "granularity": "delayed",
        "estimator": "grpo",
        "lam": 0.4,
        "gamma": 0.3,
        "clip_range": 0.1,
        "responses_per_prompt": 8,
    }
    assert set(settings) == set(OPTIONS)
    cell = Cell("sum", 3, "all", settings, 40)
    seen: dict[str, Any] = {}

    class ParsedOnly(RTOCLI):
        """Ends before anything is built."""

        def before_instantiate_classes(self) -> None:
            seen.update(self.config.as_dict()["fit"])
            raise StopIteration

    prepared = Preparation(tmp_path, "sum", 3)
    with pytest.raises(StopIteration):
        ParsedOnly(online_arguments(cell, FULL, prepared, tmp_path / "cell"), [str(CONFIGS / "rto.yaml")])
    model = seen["model"]["init_args"]
    rewards = {name: model["rewards"][name] for name in ("beta_1", "beta_2", "token_reward_clip", "granularity")}
    ppo = {name: model["ppo"][name] for name in ("estimator", "lam", "gamma", "clip_range")}
    sampled = {"responses_per_prompt": model["rollout"]["responses_per_prompt"]}
    lr = {model[name]["init_args"]["lr"] for name in ("policy_optimizer", "critic_optimizer")}
    assert {**rewards, **ppo, **sampled, "lr": lr.pop()} == settings and not lr
    assert seen["data"]["init_args"]["batch_size"] == 8
    assert [callback["init_args"] for callback in seen["trainer"]["callbacks"]] == [{"gold": "sum"}]


def test_preference_methods_are_those_of_the_pipeline(tmp_path: Path) -> None:
    protocol = with_preference_methods(FULL)
    assert [method.name for method in protocol.preference_methods] == list(PREFERENCE_TITLES)
    losses = {method.name: method.fixed.get("model.loss", "dpo") for method in protocol.preference_methods}
    assert losses == {"cdpo": "dpo", **{name: name for name in PREFERENCE_TITLES if name != "cdpo"}}
    cell = Cell("sum", 3, "ipo", {"model.loss": "ipo"}, 0)
    prepared = Preparation(tmp_path, "sum", 3)
    options = parsed(preference_arguments(cell, prepared, tmp_path / "cell"))
    assert options["model.loss"] == "ipo"
    assert options["data.train"] == str(prepared.preferences / "train.jsonl")
    assert "model.ppo.minibatch_size" not in options


def test_both_gold_rewards_share_world_and_sft(tmp_path: Path) -> None:
    one, other = Preparation(tmp_path, "sum", 3), Preparation(tmp_path, "requirement", 3)
    assert (one.world, one.sft) == (other.world, other.sft)
    assert one.preferences != other.preferences and one.reward_model != other.reward_model
    assert one.sft != Preparation(tmp_path, "sum", 4).sft


def test_curves_and_last_metrics_are_read_from_the_log(tmp_path: Path) -> None:
    folder = tmp_path / "metrics" / "fit"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(
        "step,train/gold,train/kl,train/score,train/response/length,train/response/truncated,validation/accuracy\n"
        "0,0.5,0.0,1.0,10,0.1,\n0,,,,,,0.6\n1,nan,0.25,2.0,11,0.2,\n1,,,,,,0.7\n"
    )
    curves = read_curves(tmp_path)
    assert curves["kl"] == [0.0, 0.25] and curves["length"] == [10.0, 11.0] and curves["truncated"] == [0.1, 0.2]
    assert finite(curves)["gold"] == [0.5, None]
    assert last_metric(tmp_path, "validation/accuracy") == 0.7


def test_records_survive_writing_and_reading(tmp_path: Path) -> None:
    name = "sum/ppo/seed3-abc"
    write_json(tmp_path / "cells" / f"{name}.json", {"gold": float("nan"), "curve": [1.0, float("inf")]})
    assert read_cells(tmp_path) == {name: {"gold": None, "curve": [1.0, None]}}
    assert read_cells(tmp_path, {name: {"kept": True}}) == {name: {"kept": True}}
    assert [path.suffix for path in (tmp_path / "cells" / "sum" / "ppo").iterdir()] == [".json"]


def test_open_cells_are_those_not_done_that_match() -> None:
    cells = open_cells(FULL, {}, "sum/*")
    assert len(cells) == 18 and all(cell.gold == "sum" for cell in cells)
    assert len(open_cells(FULL, {cells[0].name: {}}, "sum/*")) == 17
    assert open_cells(FULL, {}, "sum/rto/*") == []


def test_a_lock_is_held_by_one_process_and_freed_with_it(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "cell"
    code = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    with lock(path) as free:
        assert free
        assert subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True).returncode != 0
        with lock(path) as again:
            assert not again
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 0
    with lock(path) as free:
        assert free


def test_a_work_folder_belongs_to_one_preparation(tmp_path: Path) -> None:
    claim(FULL, tmp_path)
    claim(replace(FULL, iterations=3), tmp_path)
    assert set(read_json(tmp_path / "made_by.json")["configs"]) == {"sft", "dpo", "reward_model", "rto"}
    with pytest.raises(SystemExit, match="another --work"):
        claim(replace(FULL, preparation={}), tmp_path)
