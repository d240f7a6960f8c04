"""NaN and infinity in every stage: the run stops or leaves the step out, says where they were, and trains on none."""

import csv
import json
import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from torch import Tensor

from rto_lightning.cli import main
from rto_lightning.errors import UserError
from rto_lightning.modules import NumericsSettings, replay
from rto_lightning.modules.rto_settings import CriticSettings, PPOSettings, RewardSettings
from tests.distributed import conftest as processes
from tests.faults.matrix import FaultMatrix
from tests.faults.numerics_worker import INJECTIONS
from tests.modules import conftest, stages
from tests.modules.injection import Fault, Inject, Undo, gradient, output, result_of, score_of_function, weights

pytestmark = pytest.mark.slow
files, roles, torchrun = conftest.files, conftest.roles, processes.torchrun

AT, STEPS = 1, 4
SKIP = NumericsSettings(action="skip")
DATA = {"sft": stages.demonstrations, "dpo": stages.preferences, "reward_model": stages.preferences}
SCORES = {"reward_function": "tests.modules.injection:scores"}


@dataclass(frozen=True)
class Case:
    """Something that is not finite in one step of a run."""

    stage: str
    inject: Inject
    name: str
    """How the error begins to name it."""
    role: str | None = None
    """The role whose step is left out; None for all."""
    full: bool = False
    """RTO with all roles and rewards instead of a reward function alone."""
    options: tuple[tuple[str, Any], ...] = ()
    """Of the RTO stage."""


PPO_GRADIENTS = "rto_lightning.modules.ppo_gradients"
SHARED = (("critic", CriticSettings(shared=True)),)
RLOO = (("ppo", PPOSettings(estimator="reinforce++", microbatch_size=2)),)
CASES = {
    "sft, log-probability nan": Case("sft", output("token_logprobs", "policy"), "the policy's log-probabilities"),
    "sft, loss nan": Case("sft", result_of("rto_lightning.modules.sft:masked_mean"), "the loss"),
    "sft, loss inf": Case("sft", result_of("rto_lightning.modules.sft:masked_mean", math.inf), "the loss"),
    "sft, gradient nan": Case("sft", gradient("policy"), "the gradient of backbone."),
    "sft, gradient inf": Case("sft", gradient("policy", -math.inf), "the gradient of backbone."),
    "sft, gradient norm overflows": Case("sft", gradient("policy", 1e30), "the gradient norm"),
    "dpo, policy nan": Case("dpo", output("token_logprobs", "policy"), "the policy's log-probabilities"),
    "dpo, reference nan": Case("dpo", output("token_logprobs", "reference"), "the reference's log-probabilities"),
    "dpo, reference -inf": Case(
        "dpo", output("token_logprobs", "reference", -math.inf), "the reference's log-probabilities"
    ),
    "dpo, loss nan": Case("dpo", result_of("rto_lightning.modules.preference:dpo_loss"), "the loss"),
    "dpo, gradient inf": Case("dpo", gradient("policy", math.inf), "the gradient of backbone."),
    "reward model, score nan": Case("reward_model", output("sequence_scores", "reward"), "the scores"),
    "reward model, score inf": Case("reward_model", output("sequence_scores", "reward", math.inf), "the scores"),
    "reward model, loss nan": Case(
        "reward_model", result_of("rto_lightning.modules.reward_model:bradley_terry_loss"), "the loss"
    ),
    "reward model, gradient nan": Case("reward_model", gradient("reward"), "the gradient of backbone."),
    "rto, score of a function nan": Case("rto", score_of_function(math.nan), "the scores of tests.modules.injection"),
    "rto, score of a function inf": Case("rto", score_of_function(math.inf), "the scores of tests.modules.injection"),
    "rto, score of a role nan": Case(
        "rto", output("sequence_scores", "reward"), "the scores of the reward role", full=True
    ),
    "rto, reference nan": Case("rto", output("token_logprobs", "reference"), "log(policy / reference)"),
    "rto, reference inf": Case("rto", output("token_logprobs", "reference", math.inf), "log(policy / reference)"),
    "rto, dpo nan": Case("rto", output("token_logprobs", "dpo"), "the token rewards", full=True),
    "rto, dpo -inf, which the clip would hide": Case(
        "rto", output("token_logprobs", "dpo", -math.inf), "the token rewards", full=True
    ),
    "rto, value nan": Case("rto", output("token_values", "critic"), "the critic's values"),
    "rto, advantage inf of a shared critic": Case(
        "rto", result_of("rto_lightning.modules.rto:estimate_advantages", math.inf), "the advantages", options=SHARED
    ),
    "rto, advantage nan": Case("rto", result_of("rto_lightning.modules.rto:whiten"), "the advantages"),
    "rto, advantage nan without a critic": Case(
        "rto", result_of("rto_lightning.modules.rto:whiten"), "the advantages", options=RLOO
    ),
    "rto, policy's log-probability nan": Case(
        "rto", output("token_logprobs", "policy"), "the policy loss", role="policy"
    ),
    "rto, policy loss nan": Case("rto", result_of(f"{PPO_GRADIENTS}:policy_loss"), "the policy loss", role="policy"),
    "rto, value loss inf": Case(
        "rto", result_of(f"{PPO_GRADIENTS}:value_loss", math.inf), "the value loss", role="critic"
    ),
    "rto, gradient of the policy nan": Case("rto", gradient("policy"), "the gradient of backbone.", role="policy"),
    "rto, gradient of the policy inf without a critic": Case(
        "rto", gradient("policy", math.inf), "the gradient of backbone.", role="policy", options=RLOO
    ),
    "rto, gradient of the critic nan": Case("rto", gradient("critic"), "the gradient of backbone.", role="critic"),
    "rto, gradient of a shared critic nan": Case(
        "rto", gradient("critic"), "the gradient of backbone.", role="critic", options=SHARED
    ),
}


def run(
    case: Case, settings: NumericsSettings, inputs: Any, folder: Path, *callbacks: Callback, mode: str = "adapters"
) -> tuple[Any, list[dict[str, float]]]:
    """The module that was trained, and the metrics of each step."""
    model, roles, files, options = inputs
    torch.manual_seed(0)
    if case.stage == "rto":
        changes = {"seed": 1, "numerics": settings, **dict(case.options)}
        if case.full:
            module: Any = stages.full_rto(model, roles, mode, **changes)
        else:
            module = stages.rto(model, backbone={"mode": mode}, **SCORES, **changes)
        data = stages.prompts(files)
    else:
        module, data = getattr(stages, case.stage)(model, mode=mode), DATA[case.stage](files)
        module.guard.settings = settings
    recorder = stages.Recorder()
    trainer = stages.trainer(
        folder, STEPS, callbacks=[*callbacks, recorder], logger=True, log_every_n_steps=1, **options
    )
    try:
        trainer.fit(module, data)
    finally:
        module.steps = trainer.global_step
    return module, recorder.metrics


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture
def inputs(tiny_model: Path, roles: Any, files: Any) -> Any:
    """The model, its roles, its data, and options of the trainer."""
    return tiny_model, roles, files, {}


@pytest.mark.parametrize("name", CASES)
def test_a_run_stops_before_it_trains_on_what_is_not_finite(inputs, tmp_path, faults: FaultMatrix, name):
    case = CASES[name]
    with faults.tried("numerics", f"{name}, stop"):
        fault, kept = Fault(case.inject, AT, role=case.role), KeepWeights(case.role)
        with pytest.raises(UserError) as error:
            run(case, NumericsSettings(), inputs, tmp_path, fault, kept)
        unit = "iteration" if case.stage == "rto" else "step"
        assert f" values of {case.name}" in str(error.value)
        assert f" are NaN or infinite in {unit} {AT} of the {case.stage} stage; no weight" in str(error.value)
        assert fault.before and equal(kept.weights, fault.before)
        path = tmp_path / f"nonfinite/step-{AT}.pt"
        dump = torch.load(path, weights_only=True)
        assert (dump["step"], dump["found"]["name"].startswith(case.name)) == (AT, True)
        assert str(path) in str(error.value)


class KeepWeights(Callback):
    """The weights of a run that has failed, of all roles or of one: the policy steps before the critic."""

    def __init__(self, role: str | None) -> None:
        self.role = role

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.weights = weights(pl_module, self.role)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:.*NaN or infinite in")
def test_a_step_left_out_is_a_step_without_an_update(inputs, tmp_path, faults: FaultMatrix, name):
    case = CASES[name]
    with faults.tried("numerics", f"{name}, skip"):
        left_out, metrics = run(case, SKIP, inputs, tmp_path / "skip", Fault(case.inject, AT))
        undone, others = run(case, SKIP, inputs, tmp_path / "undo", Undo(AT, case.role))
        check_left_out(left_out, metrics, undone, others)


def check_left_out(left_out: Any, metrics: Any, undone: Any, others: Any) -> None:
    """The run has the weights of one in which that step was undone, and the same metrics from then on."""
    assert left_out.steps == undone.steps == STEPS
    assert equal(weights(left_out), weights(undone))
    assert all(weight.isfinite().all() for weight in weights(left_out))
    assert [row.get("train/skipped_steps") for row in metrics] == [None, *[1.0] * (STEPS - 1)]
    for ours, theirs in zip(metrics[AT + 1 :], others[AT + 1 :], strict=True):
        same = [name for name in theirs if "second" not in name]
        assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}


@pytest.mark.parametrize("stage", ["sft", "reward_model", "rto"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.filterwarnings("ignore:.*NaN or infinite in")
def test_mode_full_and_mixed_precision(inputs, tmp_path, faults: FaultMatrix, stage, precision):
    role = "reward" if stage == "reward_model" else "policy"
    case = Case(stage, gradient(role, math.inf), "the gradient of", role="policy" if stage == "rto" else None)
    inputs = (*inputs[:3], {"precision": precision})
    with faults.tried("numerics", f"{stage} in mode full, {precision}"):
        left_out, metrics = run(case, SKIP, inputs, tmp_path / "skip", Fault(case.inject, AT), mode="full")
        undone, others = run(case, SKIP, inputs, tmp_path / "undo", Undo(AT, case.role), mode="full")
        check_left_out(left_out, metrics, undone, others)


@pytest.mark.parametrize("bad_batch", [3, 4])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.filterwarnings("ignore:.*NaN or infinite in")
def test_one_of_several_accumulated_batches(inputs, tmp_path, faults: FaultMatrix, bad_batch, algorithm):
    """Nothing of the step is taken, and the file holds all its batches. An epoch has 3 batches and thus 2 steps."""
    case = Case("dpo", output("token_logprobs", "reference"), "the reference's log-probabilities")
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "gradient_clip_algorithm": algorithm}
    inputs = (*inputs[:3], options)

    class OneBatch(Fault):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch * 3 + batch_idx == bad_batch:
                super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    class UndoBatches(Undo):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step > self.step:
                super().on_train_batch_end(trainer, *args)

    with faults.tried("numerics", f"batch {bad_batch} of two accumulated ones, clipped by {algorithm}"):
        left_out, _ = run(case, SKIP, inputs, tmp_path / "skip", OneBatch(case.inject, 2))
        undone, _ = run(case, SKIP, inputs, tmp_path / "undo", UndoBatches(2))
        assert equal(weights(left_out), weights(undone)) and left_out.guard.state() == [1, 1, 2]
        path = tmp_path / "skip/nonfinite/step-2.pt"
        assert len(torch.load(path, weights_only=True)["batches"]) == 2
        assert replay(stages.dpo(inputs[0]), path) == {}


@pytest.mark.filterwarnings("ignore:.*NaN or infinite in")
def test_the_adaptive_kl_coefficient_stays_finite(inputs, tmp_path, faults: FaultMatrix):
    rewards = RewardSettings(beta_1=0.0, normalization_samples=8, kl_target=0.5, kl_horizon=50)
    case = Case("rto", output("token_logprobs", "reference"), "", options=(("rewards", rewards),))
    with faults.tried("numerics", "rto, reference nan with an adaptive KL coefficient, skip"):
        _, metrics = run(case, SKIP, inputs, tmp_path, Fault(case.inject, AT))
        coefficients = [row["train/kl_coefficient"] for row in metrics]
        assert all(map(math.isfinite, coefficients))
        assert coefficients[AT] == coefficients[AT + 1]  # logged before an iteration changes it
        assert math.isnan(metrics[AT]["train/kl"]) and coefficients[0] != coefficients[AT]


@pytest.mark.filterwarnings("ignore:.*NaN or infinite in")
def test_the_moving_average_stays_finite(inputs, tmp_path, faults: FaultMatrix):
    case = Case("rto", gradient("policy"), "", options=(("ema_decay", 0.5),))
    with faults.tried("numerics", "rto, gradient nan with a moving average, skip"):
        module, _ = run(case, SKIP, inputs, tmp_path, Fault(case.inject, *range(1, STEPS)))
        start = stages.rto(inputs[0], **SCORES)
        torch.manual_seed(0)
        start.configure_model()
        # The policy moved once; the average half as far, then half of the rest with each iteration.
        moved = zip(*(weights(m, role) for m, role in ((start, "policy"), (module, "policy"))), strict=True)
        for (before, after), average in zip(moved, weights(module, "policy_average"), strict=True):
            torch.testing.assert_close(average, torch.lerp(after, before, 0.5**STEPS), rtol=0, atol=1e-7)


@pytest.mark.parametrize("action", ["stop", "skip"])
@pytest.mark.filterwarnings("ignore:.*NaN or infinite")
def test_statistics_of_the_scores(inputs, tmp_path, faults: FaultMatrix, action):
    """One answer of the reference policy in each batch has no finite score."""
    settings = NumericsSettings(action=action)

    class OnlyThen(Callback):
        def __init__(self) -> None:
            self.context = score_of_function(math.nan)(None)

        def setup(self, *args: Any, **kwargs: Any) -> None:
            self.context.start()

        def on_train_start(self, *args: Any) -> None:
            self.context.stop()

        def on_exception(self, *args: Any) -> None:
            self.context.stop()

    with faults.tried("numerics", f"rto, score nan in the statistics, {action}"):
        case = Case("rto", score_of_function(math.nan), "")
        if action == "stop":
            with pytest.raises(UserError, match="1 of 4 answers of the reference policy have a score that is NaN"):
                run(case, settings, inputs, tmp_path, OnlyThen())
        else:
            module, _ = run(case, settings, inputs, tmp_path, OnlyThen())
            assert module.scores.normalizer().mean_std.isfinite().all()
            assert all(weight.isfinite().all() for weight in weights(module))


@pytest.mark.parametrize(("strategy", "mode"), [("ddp", "adapters"), ("fsdp", "adapters"), ("fsdp", "full")])
def test_all_ranks_do_the_same(inputs, tmp_path, faults: FaultMatrix, torchrun, strategy, mode):
    model, _, files, _ = inputs
    settings = {"strategy": strategy, "mode": mode, "out": str(tmp_path), "model": str(model), **files}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with ExitStack() as stack:
        for fault in INJECTIONS:
            stack.enter_context(faults.tried("numerics", f"{fault} on one rank of two, {strategy}, mode {mode}"))
        printed = torchrun(2, "tests.faults.numerics_worker", str(tmp_path / "settings.json"))
        assert all(f"{fault}: rank {rank} agrees" in printed for fault in INJECTIONS for rank in range(2))


def command(inputs: Any, folder: Path, **changes: Any) -> list[str]:
    """Arguments of a run of RTO whose reward function fails in the second iteration."""
    model, _, files, _ = inputs
    settings = {
        "trainer": {"accelerator": "cpu", "max_steps": 3, "log_every_n_steps": 1, "default_root_dir": str(folder)},
        "model": {
            "class_path": "rto_lightning.modules.RTOModule",
            "init_args": {
                "backbone": {"model": str(model)},
                "rewards": {"beta_1": 0.0, "normalization_samples": 4},
                "reward_function": "tests.faults.test_numerics:third_call_fails",
                "critic": {"init": "policy"},
                "rollout": {"max_new_tokens": 6},
                "ppo": {"scoring_batch_size": 4},
                **changes,
            },
        },
        "data": {
            "class_path": "rto_lightning.data.PromptDataModule",
            "init_args": {"train": files["prompts"], "batch_size": 4},
        },
    }
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    calls.clear()
    return ["fit", f"--config={path}"]


calls: list[int] = []


def third_call_fails(prompts: list[Any], responses: list[str]) -> list[float]:
    """The first call is for the statistics."""
    calls.append(len(prompts))
    return [math.nan if len(calls) == 3 else float(len(response)) + n for n, response in enumerate(responses)]


def test_the_command_stops(inputs, tmp_path, faults: FaultMatrix, capsys):
    with faults.tried("numerics", "a reward function returns nan, command"):
        assert main(command(inputs, tmp_path / "out")) == 1
        [line] = capsys.readouterr().err.splitlines()[-1:]
        assert line.startswith("rto-lightning: error: 4 of 4 values of the scores of tests.faults.test_numerics:third")
        assert line.endswith("set model.numerics.action to skip to leave such iterations out.")
        assert (tmp_path / "out/nonfinite/step-1.pt").exists() and not (tmp_path / "out/role").exists()


def test_the_command_skips(inputs, tmp_path, faults: FaultMatrix):
    with faults.tried("numerics", "a reward function returns nan, command with action skip"):
        numerics = {"action": "skip", "folder": str(tmp_path / "kept")}
        with pytest.warns(UserWarning, match="iterations with something left out: 1"):
            assert main(command(inputs, tmp_path / "out", numerics=numerics)) == 0
        assert [path.name for path in (tmp_path / "kept").iterdir()] == ["step-1.pt"]
        with next((tmp_path / "out/metrics").rglob("metrics.csv")).open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["train/kl"]]
        assert [row["train/skipped_steps"] for row in rows] == ["", "1.0", "1.0"]
        assert json.loads((tmp_path / "out/role/role.json").read_text())["role"] == "policy"
