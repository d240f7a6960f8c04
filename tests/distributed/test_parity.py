"""Several ranks train the parameters that one process trains, in float64 to 1e-8."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rto_lightning.inspection.samples import SAMPLES_FILE, read_samples
from tests.distributed.conftest import Launch, Torchrun
from tests.distributed.worker import Case

TOLERANCE = 1e-8

GAE: dict[str, Any] = {
    "ppo": {"epochs": 2, "minibatch_size": 4, "aggregation": "token", "entropy_coefficient": 0.01},
    "rewards": {"kl_target": 0.5, "kl_horizon": 50},
    "ema_decay": 0.5,
}
"""A critic, minibatches whose token counts differ between ranks, an adaptive KL coefficient, a moving average."""
RLOO: dict[str, Any] = {
    "ppo": {"estimator": "rloo", "minibatch_size": 8, "kl_stop": 0.5},
    "rollout": {"responses_per_prompt": 2, "batch_size": 3},
}
"""Groups of responses, no critic."""
SHARED: dict[str, Any] = {
    "critic": {"shared": True},
    "ppo": {"minibatch_size": 4},
    "rollout": {"gather_weights": False},
}
"""A critic on the policy; under FSDP the ranks sample in step, each layer gathered at every token."""


def cases(folder: Path, inputs: dict[str, str], strategies: tuple[str, ...], everything: bool) -> dict[str, Case]:
    """By name; all strategies of one stage, mode and settings have names that begin alike."""
    wanted: list[tuple[str, str, str, dict[str, Any]]] = []
    for mode in ("adapters", "full"):
        wanted.append((f"rto-{mode}", "rto", mode, GAE))
        if everything:
            wanted += [(f"{stage}-{mode}", stage, mode, {}) for stage in ("sft", "dpo", "reward_model")]
            wanted += [(f"rloo-{mode}", "rto", mode, RLOO), (f"shared-{mode}", "rto", mode, SHARED)]
    return {
        f"{name}-{strategy}": Case(
            out=str(folder / f"{name}-{strategy}"),
            stage=stage,
            mode=mode,
            strategy=strategy,
            model=inputs["model"],
            data=inputs["demonstrations" if stage == "sft" else "rows"],
            roles={role: inputs[f"{role}_{mode}"] for role in ("dpo", "reward")},
            options=options,
            steps=4 if stage == "sft" else 3,  # validation metrics of the first epoch are read at the fourth step
            backbone={"gradient_checkpointing": name == "rto-full"},
        )
        for strategy in strategies
        for name, stage, mode, options in wanted
    }


def check_same(case: Case, expected: Case, last_steps: int | None = None) -> None:
    """Weights of every role and metrics of every step, or of the last ones, are those of the other run."""
    folders = [path.name for path in Path(expected.out).iterdir() if (path / "role.json").exists()]
    assert folders
    for folder in folders:
        files = sorted(path.name for path in (Path(expected.out) / folder).glob("*.safetensors"))
        assert files
        for file in files:
            ours, theirs = (load_file(Path(run.out) / folder / file) for run in (case, expected))
            assert ours.keys() == theirs.keys()
            for name in theirs:
                difference = (ours[name].double() - theirs[name].double()).abs().max().item()
                assert difference < TOLERANCE, f"{case.out}: {folder}/{name} differs by {difference}"
    check_metrics(case, expected, last_steps)
    if last_steps is None:
        check_samples(case, expected)


def check_samples(case: Case, expected: Case) -> None:
    """Answers of an RTO run to fixed prompts, which every rank samples, are those of the other run."""
    ours, theirs = (read_samples(Path(run.out) / SAMPLES_FILE) for run in (case, expected))
    assert len(theirs) == (6 if expected.stage == "rto" else 0), "two before, two after two iterations, two at the end"
    assert [sample.rewarded.token_ids for sample in ours] == [sample.rewarded.token_ids for sample in theirs]
    for of_ours, of_theirs in zip(ours, theirs, strict=True):
        assert of_ours.rewarded.rewards == pytest.approx(of_theirs.rewarded.rewards, rel=1e-4, abs=1e-6)


def check_metrics(case: Case, expected: Case, last_steps: int | None = None) -> None:
    """Metrics of every step, or of the last ones, are those of the other run."""
    ours, theirs = (json.loads((Path(run.out) / "metrics.json").read_text()) for run in (case, expected))
    assert len(theirs) == expected.steps
    theirs = theirs[-(last_steps or 0) :]
    assert len(ours) == len(theirs)
    for of_ours, of_theirs in zip(ours, theirs, strict=True):
        assert of_ours.keys() == of_theirs.keys()
        for name, value in of_theirs.items():
            # A deviation on held-out prompts is that of a batch, which has fewer rows on each of several ranks.
            if "second" not in name and name != "validation/score_std":
                # Means are logged in float32, and those of a stage other than RTO are means over ranks.
                assert of_ours[name] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), name


def moved(case: Case, other: Case) -> bool:
    """Whether two runs trained different weights."""
    (file,) = [path.name for path in (Path(case.out) / "policy").glob("*model.safetensors")]
    ours, theirs = (load_file(Path(run.out) / "policy" / file) for run in (case, other))
    return any((ours[name] - theirs[name]).abs().max() > 1e-4 for name in theirs)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, str], launch: Launch) -> dict[str, Case]:
    """All cases, run in one process and in two."""
    folder = tmp_path_factory.mktemp("parity")
    single, double = (cases(folder, inputs, names, True) for names in (("auto",), ("ddp", "fsdp")))
    launch(list(single.values()), 1)
    launch(list(double.values()), 2)
    return {**single, **double}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("mode", ["adapters", "full"])
@pytest.mark.parametrize("name", ["rto", "rloo", "shared", "sft", "dpo", "reward_model"])
def test_two_ranks_train_what_one_process_trains(name: str, mode: str, strategy: str, runs: dict[str, Case]) -> None:
    check_same(runs[f"{name}-{mode}-{strategy}"], runs[f"{name}-{mode}-auto"])


@pytest.mark.slow
def test_four_ranks_train_what_one_process_trains(
    tmp_path: Path, inputs: dict[str, str], launch: Launch, runs: dict[str, Case]
) -> None:
    four = cases(tmp_path, inputs, ("ddp", "fsdp"), False)
    launch(list(four.values()), 4)
    for name, case in four.items():
        check_same(case, runs[f"{name.rpartition('-')[0]}-auto"])


@pytest.mark.slow
def test_gradients_are_summed_in_float32(tmp_path: Path, inputs: dict[str, str], launch: Launch) -> None:
    """Where FSDP reduces by another operation than in float64; the metrics hold the norms of the gradients."""
    both = cases(tmp_path, inputs, ("auto", "fsdp"), False)
    names = [f"rto-full-{strategy}" for strategy in ("auto", "fsdp")]
    alone, two = (replace(both[name], steps=1, backbone={"dtype": "float32"}) for name in names)
    launch([alone], 1)
    launch([two], 2)
    check_metrics(two, alone)


@pytest.mark.slow
def test_quantized_weights_are_spread(inputs: dict[str, str], torchrun: Torchrun) -> None:
    """NF4 under FSDP2: each rank holds half of the packed weights, and nothing that is computed changes."""
    printed = torchrun(2, "tests.distributed.quantized", inputs["model"])
    assert printed.count("as before") == 2


@pytest.mark.slow
def test_the_cases_differ(runs: dict[str, Case]) -> None:
    """So that the comparison above can fail."""
    assert moved(runs["rto-adapters-auto"], runs["rloo-adapters-auto"])
    assert moved(runs["rto-full-auto"], runs["shared-full-auto"])
