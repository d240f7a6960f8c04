"""Every file under `configs/` is run, on a model and data that take no time.

Each stage and overlay trains one step through the command that heads its file, or alone if none does; so do models,
methods, precisions and strategies put together. What a file says is kept, but for names of files, the number of steps,
the size of a batch and the length of an answer.
"""

import csv
import math
import random
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rto_lightning.backbone import RoleCard
from rto_lightning.cli import main
from rto_lightning.cli.lightning_cli import RTOCLI
from rto_lightning.quickstart.grammar import all_requests, sample_review
from rto_lightning.quickstart.jsonl import write_jsonl
from rto_lightning.quickstart.model import TinyModelSettings, write_tiny_model
from tests.config_files import FILES, PIPELINES, QUICK_STAGES, ROOT, STAGES, cases, name_of, value_at
from tests.models import write_tiny_neox, write_tiny_qwen2
from tests.roles import save_random_role

COMMAND = re.compile(r"^# +rto-lightning fit (.+)$", re.MULTILINE)
FIRST_LINE = re.compile(r"# \S.{20,}\. Hardware: \S.+\.")
"""What a file is for, and what it wants to run on."""
SOURCES = ("train", "validation", "test", "predict")
BATCH = 4
"""Prompts or pairs of a batch, and rows of a file: an epoch is one batch, and ends with the validation."""
TOKENS = 12
"""The longest answer."""

SETTINGS = {
    "rto_lightning.modules.SFTModule": {},
    "rto_lightning.modules.PreferenceModule": {},
    "rto_lightning.modules.RewardModelModule": {"model.score_statistics.max_new_tokens": TOKENS},
    "rto_lightning.modules.RTOModule": {
        "model.rollout.max_new_tokens": TOKENS,
        "model.ppo.minibatch_size": BATCH,
        "model.ppo.microbatch_size": 2,
        "model.critic.warmup_iterations": 0,  # the one step shall train the policy too
    },
}
"""For each stage, what a run of one step needs beside the model and the data."""
SAVED_AS = {"PreferenceModule": "dpo", "RewardModelModule": "reward"}
DATA = {
    "rto_lightning.data.DemonstrationDataModule": "demonstrations",
    "rto_lightning.data.PreferenceDataModule": "preferences",
    "rto_lightning.data.PromptDataModule": "prompts",
}
"""For each kind of data, the file of that kind."""
BACKBONES: dict[tuple[str, str], dict[str, Any]] = {
    ("llama", "adapters"): {},
    ("llama", "full"): {"mode": "full"},
    ("qwen", "adapters"): {},
    ("qwen", "full"): {"mode": "full"},
    ("pythia", "adapters"): {"chat_template": "plain"},
    ("pythia", "full"): {"mode": "full", "chat_template": "plain"},
}
"""For each architecture and mode, the settings with which a dpo and a reward role are made."""


def files_of(path: Path) -> list[Path]:
    """The files of the command that heads a file, which is one of them; the file alone if there is no command."""
    command = COMMAND.search(path.read_text(encoding="utf-8").replace("\\\n#", ""))
    words = shlex.split(command[1]) if command else []
    files = [ROOT / value for name, value in pairwise(words) if name == "--config"] or [path]
    assert path in files
    return files


@pytest.fixture(autouse=True)
def parse_only_fit(monkeypatch) -> None:
    """The parsers of the other commands would take a third of the time."""
    fit = {"fit": RTOCLI.subcommands()["fit"]}
    monkeypatch.setattr(RTOCLI, "subcommands", staticmethod(lambda: fit))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    """Tiny models, a dpo and a reward role on each in each mode, and a file of each kind of data."""
    folder = tmp_path_factory.mktemp("inputs")
    write_tiny_model(folder / "llama", settings=TinyModelSettings(16, 32, layers=1, heads=2))
    write_tiny_neox(folder / "pythia")
    write_tiny_qwen2(folder / "qwen")
    rng = random.Random(0)
    requests = rng.sample(all_requests(), BATCH)
    rows = [
        {"prompt": request.messages, "chosen": sample_review(request, rng), "rejected": sample_review(request, rng)}
        for request in requests
    ]
    write_jsonl(folder / "preferences.jsonl", rows)
    write_jsonl(folder / "demonstrations.jsonl", ({"prompt": r["prompt"], "response": r["chosen"]} for r in rows))
    write_jsonl(folder / "prompts.jsonl", ({"prompt": row["prompt"]} for row in rows))
    for (architecture, mode), settings in BACKBONES.items():
        for role in ("dpo", "reward"):
            save_random_role(folder / architecture, folder / f"{architecture}-{mode}-{role}", role, **settings)
    return {path.stem: str(path) for path in folder.iterdir()}


def class_path(settings: dict[str, Any], part: str, known: dict[str, Any]) -> str:
    """The class that a configuration names for its model or data."""
    path = settings.get(part, {}).get("class_path")
    if path not in known:
        pytest.fail(f"{part}.class_path {path} is new to this test; say in {__file__} what a run of it needs")
    return path


def architecture_of(files: Sequence[Path]) -> str:
    """That of the stage, which is the first file."""
    return next((name for name in ("pythia", "qwen") if name in name_of(files[0])), "llama")


def last_value(contents: list[dict[str, Any]], key: str) -> Any:
    """What the last of several files that has a dotted key says; None if none has it."""
    for settings in reversed(contents):
        with suppress(KeyError):
            return value_at(settings, key)
    return None


def read(files: Sequence[Path]) -> list[dict[str, Any]]:
    return [yaml.safe_load(file.read_text(encoding="utf-8")) for file in files]


def overrides(files: Sequence[Path], inputs: dict[str, str], folder: Path) -> dict[str, Any]:
    """What a run of one step sets differently."""
    contents, architecture = read(files), architecture_of(files)
    settings = contents[0]
    mode = last_value(contents, "model.backbone.mode") or "adapters"
    named = [role for role in ("dpo", "reward") if last_value(contents, f"model.{role}") is not None]
    roles = {f"model.{role}": inputs[f"{architecture}-{mode}-{role}"] for role in named}
    kind = DATA[class_path(settings, "data", DATA)]
    looks = {"trainer.val_check_interval": 1} if "val_check_interval" in settings["trainer"] else {}
    rows = {f"data.{source}": inputs[kind] for source in SOURCES if source in settings["data"]["init_args"]}
    return {
        "trainer.default_root_dir": folder,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 1,
        "trainer.accumulate_grad_batches": 1,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "model.backbone.model": inputs[architecture],
        "data.batch_size": BATCH,
        **looks,
        **rows,
        **roles,
        **SETTINGS[class_path(settings, "model", SETTINGS)],
    }


def logged(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv, without empty cells."""
    with (folder / "metrics/fit/metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_there_are_configurations() -> None:
    assert {"quickstart/rto.yaml", "smollm2_135m/rto.yaml"} <= set(map(name_of, STAGES))
    assert {"quickstart/pipeline.yaml", "quickstart/methods.yaml"} <= set(map(name_of, PIPELINES))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_begins_with_what_it_is_for_and_on_what_it_runs(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert FIRST_LINE.fullmatch(lines[0])
    assert all(len(line) <= 120 for line in lines)
    assert isinstance(yaml.safe_load("\n".join(lines)), dict)


def fit(files: Sequence[Path], changes: dict[str, Any]) -> int:
    """Runs the command with some files and options."""
    configs = [f"--config={file}" for file in files]
    return main(["fit", *configs, *(f"--{key}={value}" for key, value in changes.items())])


@pytest.mark.parametrize("path", cases(STAGES, QUICK_STAGES))
def test_a_stage_trains_one_step(path: Path, inputs: dict[str, str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    train_one_step(files_of(path), inputs, tmp_path)


def train_one_step(files: Sequence[Path], inputs: dict[str, str], tmp_path: Path) -> None:
    """Trains, and checks what a step must leave behind."""
    contents = read(files)
    settings = contents[0]
    assert fit(files, overrides(files, inputs, tmp_path / "out")) == 0

    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    training = [row for row in logged(tmp_path / "out") if any(name.startswith("train/") for name in row)]
    assert len(training) == 1
    assert all(math.isfinite(float(value)) for value in training[0].values())
    if "validation" in settings["data"]["init_args"]:
        assert any(name.startswith("validation/") for row in logged(tmp_path / "out") for name in row)

    role = tmp_path / "out/role"
    card = RoleCard.read(role)
    assert card is not None
    assert card.role == SAVED_AS.get(settings["model"]["class_path"].rpartition(".")[2], "policy")
    assert card.kind == ("model" if last_value(contents, "model.backbone.mode") == "full" else "adapter")
    moved = movements(role, Path(inputs[architecture_of(files)]))
    assert moved and all(moved)


PRECISIONS = ("", "lora_bf16", "qlora_nf4", "full_bf16_mixed")
STRATEGIES = ("", "ddp", "fsdp", "fsdp_offload")
COMBINED = {
    "quickstart": ("sft", "rto rloo", "rto rto_grpo", "dpo tdpo1"),
    "smollm2_135m": ("rto ppo", "rto grpo", "rto rto_reinforce_pp", "dpo ipo"),
    "qwen2.5_0.5b": ("rto reinforce_pp", "rto rto_rloo", "dpo tdpo2", "reward_model"),
    "llama3_8b": ("dpo simpo", "rto ddpo", "dpo", "rto rs_ppo"),
    "tldr_pythia_2.8b": ("rto", "rto semi_rto", "dpo rdpo", "dpo cdpo"),
}
"""For each model, stages with their methods. The n-th of a model is put together with the n-th precision, and with a
strategy such that every pair of model, precision and strategy is run."""


def combinations() -> list[tuple[str, ...]]:
    """(model, stage with its method, precision, strategy)."""
    return [
        (model, name, precision, STRATEGIES[(row + column) % len(STRATEGIES)])
        for row, (model, names) in enumerate(COMBINED.items())
        for column, (name, precision) in enumerate(zip(names, PRECISIONS, strict=True))
    ]


def test_every_pair_of_model_precision_and_strategy_is_put_together() -> None:
    made = combinations()
    axes: dict[int, Sequence[str]] = {0: list(COMBINED), 2: PRECISIONS, 3: STRATEGIES}
    for first, second in ((0, 2), (0, 3), (2, 3)):
        assert {(row[first], row[second]) for row in made} == set(product(axes[first], axes[second]))
    for position, folder in ((2, "precision"), (3, "strategy")):
        assert set(axes[position]) - {""} == {path.stem for path in STAGES if name_of(path).startswith(folder)}
    assert {name.partition(" ")[2] for _, name, *_ in made} - {""} == {
        path.stem for path in STAGES if name_of(path).startswith("method")
    }


@pytest.mark.slow
@pytest.mark.parametrize(("model", "name", "precision", "strategy"), combinations())
def test_overlays_go_together(model, name, precision, strategy, inputs, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    stage, _, method = name.partition(" ")
    named = f"{model}/{stage}", f"method/{method}", f"precision/{precision}", f"strategy/{strategy}"
    train_one_step([ROOT / f"configs/{part}.yaml" for part in named if not part.endswith("/")], inputs, tmp_path)


REFUSED = {
    "smollm2_135m/rto method/simpo": "method/simpo.yaml line 7: unknown key `model.loss`",
    "smollm2_135m/dpo method/ppo": "method/ppo.yaml line 8: unknown key `model.rewards`",
    "smollm2_135m/rto method/ppo method/semi_rto": "rewards.granularity sentence moves token rewards, of which",
    "smollm2_135m/dpo method/cdpo method/rdpo": "label_smoothing belongs to loss dpo and does not go with loss rdpo",
    "tldr_pythia_2.8b/rto method/ppo": "rewards.beta_3 is not 0, which needs model.reward",
    "llama3_8b/rto llama3_8b/qlora_24gb/rto strategy/fsdp": "PagedAdamW8bit does not step weights that FSDP spreads",
    "method/ppo smollm2_135m/rto": "method/ppo.yaml is an overlay of a stage; put it after",
    "method/ppo": "method/ppo.yaml",
}
"""Files that do not go together, and what is said of it."""


@pytest.mark.slow
@pytest.mark.parametrize("named", REFUSED)
def test_what_does_not_go_together_is_refused(named: str, inputs, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    files = [ROOT / f"configs/{part}.yaml" for part in named.split()]
    stage = "data" in read(files)[0]
    assert fit(files, overrides(files, inputs, tmp_path / "out") if stage else {}) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("rto-lightning: error: ") and error.count("\n") == 1
    assert REFUSED[named] in error


OPTIONS = {
    "model": {
        "more_rewards": [
            {"reward": "{reward}", "weight": 0.5},
            {"reward_function": "tests.modules.stages:count_exclamations"},
        ],
        "ema_decay": 0.9,
        "rollout": {"responses_per_prompt": 2},
        "rewards": {
            "granularity": "sentence", "kl_target": 3.0, "truncation_penalty": 1.0, "min_response_tokens": 4,
            "short_penalty": 1.0,
        },
        "ppo": {
            "estimator": "rloo", "whiten_advantages": True, "dual_clip": 3.0, "entropy_coefficient": 0.01,
            "kl_stop": 0.1,
        },
    }
}  # fmt: skip
"""What the README lists as options of RTO."""


def test_every_option_is_taken_from_yaml(inputs: dict[str, str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = yaml.safe_dump(OPTIONS).replace("{reward}", inputs["llama-full-reward"])
    (tmp_path / "options.yaml").write_text(text, encoding="utf-8")
    path = ROOT / "configs/quickstart/rto.yaml"
    assert fit([path, Path("options.yaml")], overrides([path], inputs, tmp_path / "out")) == 0
    [training] = logged(tmp_path / "out")
    assert {"train/score", "train/score_2", "train/score_3", "train/policy/optimizer_steps"} <= set(training)
    assert not any(name.startswith("train/critic") for name in training)


def movements(role: Path, base: Path) -> list[bool]:
    """Whether the weights that can move in a first step did."""
    if (role / "head.safetensors").exists():  # of zeros at first, so that what is below it gets no gradient
        return [bool(load_file(role / "head.safetensors")["weight"].any())]
    if (role / "adapter_model.safetensors").exists():  # its factors B are zeros at first, and A gets no gradient
        weights = load_file(role / "adapter_model.safetensors")
        return [bool(weight.any()) for name, weight in weights.items() if "lora_B" in name]
    before, after = (load_file(folder / "model.safetensors") for folder in (base, role))
    return [not torch.equal(before[name], after[name]) for name in before]
