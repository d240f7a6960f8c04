"""A run that two ranks began goes on in two or in one, and ends with the parameters of the uninterrupted run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.distributed.conftest import Launch
from tests.distributed.test_parity import GAE, check_same
from tests.distributed.worker import Case

KINDS = [(mode, strategy) for mode in ("adapters", "full") for strategy in ("ddp", "fsdp")]


def case(folder: Path, inputs: dict[str, str], mode: str, strategy: str, **changes: object) -> Case:
    roles = {role: inputs[f"{role}_{mode}"] for role in ("dpo", "reward")}
    options = {**GAE, "critic": {"warmup_iterations": 3}}  # the policy has not been trained when it is saved
    made = Case(str(folder), "rto", mode, strategy, inputs["model"], inputs["rows"], roles, steps=4, options=options)
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, str], launch: Launch) -> dict[str, Case]:
    """For each mode and strategy: `whole` in one process; `begun` on two ranks to step 2; `two` and `one` go on."""
    root = tmp_path_factory.mktemp("checkpoints")
    made: dict[str, Case] = {}
    for mode, strategy in KINDS:
        name = f"{mode}-{strategy}"
        begun = case(root / f"{name}-begun", inputs, mode, strategy, steps=2, checkpoint_at=2)
        checkpoint = str(Path(begun.out) / "checkpoint.ckpt")
        # A folder of shards wants FSDP, if on one device; what is whole resumes on any strategy.
        alone = "fsdp" if (mode, strategy) == ("full", "fsdp") else "auto"
        made[f"{name}-begun"] = begun
        made[f"{name}-whole"] = case(root / f"{name}-whole", inputs, mode, "auto")
        made[f"{name}-two"] = case(root / f"{name}-two", inputs, mode, strategy, resume=checkpoint)
        made[f"{name}-one"] = case(root / f"{name}-one", inputs, mode, alone, resume=checkpoint)
    for mode in ("adapters", "full"):  # a file of DDP
        checkpoint = str(Path(made[f"{mode}-ddp-begun"].out) / "checkpoint.ckpt")
        made[f"{mode}-file-two"] = case(root / f"{mode}-file-two", inputs, mode, "fsdp", resume=checkpoint)
    for ending, processes in (("begun", 2), ("two", 2), ("one", 1), ("whole", 1)):
        launch([made[name] for name in made if name.endswith(ending)], processes)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["two", "one"])
@pytest.mark.parametrize(("mode", "strategy"), KINDS)
def test_resumed_on(ranks: str, mode: str, strategy: str, runs: dict[str, Case]) -> None:
    resumed, whole = runs[f"{mode}-{strategy}-{ranks}"], runs[f"{mode}-{strategy}-whole"]
    check_same(resumed, whole, last_steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["adapters", "full"])
def test_a_file_resumes_under_fsdp(mode: str, runs: dict[str, Case]) -> None:
    check_same(runs[f"{mode}-file-two"], runs[f"{mode}-ddp-whole"], last_steps=2)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "strategy"), KINDS)
def test_only_what_is_trained_is_written(mode: str, strategy: str, runs: dict[str, Case]) -> None:
    path = Path(runs[f"{mode}-{strategy}-begun"].out) / "checkpoint.ckpt"
    if (mode, strategy) == ("full", "fsdp"):
        from torch.distributed.checkpoint import FileSystemReader

        stored = FileSystemReader(path).read_metadata().state_dict_metadata
        names = {name.removeprefix("state_dict.") for name in stored}
        names = {name for name in names if not name.startswith("optimizer_")}
    else:
        names = set(torch.load(path, weights_only=False)["state_dict"])
    models = {name.split(".")[2] for name in names if name.startswith("backbone.models.")}
    if mode == "full":
        assert models == {"policy", "critic", "policy_average"}
    else:
        assert models == {"base"} and all("lora_" in name for name in names if name.startswith("backbone.models."))
        assert not any(".dpo." in name or ".reward." in name for name in names)
