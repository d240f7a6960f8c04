"""What is not finite is found, named, counted and kept for replay."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import LlamaForCausalLM

from rto_lightning.errors import UserError
from rto_lightning.modules import NumericsSettings, replay
from rto_lightning.modules.finite import all_finite, first_nonfinite
from rto_lightning.modules.numerics import NumericsGuard
from rto_lightning.modules.reward_model import ScoreStatisticsSettings
from rto_lightning.modules.score_statistics import collect_scores
from rto_lightning.parallel import clip_gradients
from tests.models import write_tiny_model
from tests.modules import injection, stages
from tests.tiny import tiny_tokenizer

SKIP = NumericsSettings(action="skip")
BAD = st.sampled_from([math.nan, math.inf, -math.inf])
FINITE = st.floats(-1e3, 1e3, width=32)


def broken() -> injection.Fault:
    """The first step of a policy has a gradient that is not finite."""
    return injection.Fault(injection.gradient("policy"), 0)


# Tensors ------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(FINITE, min_size=1, max_size=4), min_size=1, max_size=4), st.data())
def test_the_first_tensor_that_is_not_finite_is_named(rows, data):
    named = [(f"tensor {number}", torch.tensor(row)) for number, row in enumerate(rows)]
    assert bool(all_finite(tensor for _, tensor in named)) and first_nonfinite(named) is None
    places = data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=1))
    for place in places:
        named[place][1][-1] = data.draw(BAD)
    assert not bool(all_finite(tensor for _, tensor in named))
    found = first_nonfinite(named)
    assert (found.name, found.bad, found.size) == (f"tensor {min(places)}", 1, len(rows[min(places)]))


@given(st.lists(FINITE, min_size=1, max_size=4), FINITE, BAD)
def test_what_is_not_finite_reaches_the_gradient_and_nothing_else_does(values, other, bad):
    weight = torch.tensor(values, requires_grad=True)
    plain = weight.square().sum()
    (expected,) = torch.autograd.grad(plain, weight)
    guard = NumericsGuard(SKIP)
    loss = guard.watch(None, weight.square().sum(), {"other": torch.tensor([other])})
    assert torch.equal(loss, plain) and torch.equal(torch.autograd.grad(loss, weight)[0], expected)
    # Through a clip or a saturated loss, infinity may leave loss and gradient finite.
    loss = guard.watch(None, weight.square().sum(), {"other": torch.tensor([other, bad])})
    assert loss.isnan() and torch.autograd.grad(loss, weight)[0].isnan().all()


def test_clipping_leaves_gradients_that_are_not_finite_as_they_are():
    weight = torch.nn.Parameter(torch.zeros(3))
    for bad in (math.nan, math.inf):
        weight.grad = torch.tensor([3.0, bad, 4.0])
        assert not clip_gradients([weight], 1.0).isfinite()
        assert weight.grad.isfinite().tolist() == [True, False, True]
    weight.grad = torch.tensor([3.0, 0.0, 4.0])
    assert clip_gradients([weight], None) == 5.0 and weight.grad.norm() == 5.0
    assert clip_gradients([weight], 1.0) == 5.0
    torch.testing.assert_close(weight.grad.norm(), torch.tensor(1.0))


# Counts -------------------------------------------------------------------------------------------------------


def guard_that_keeps_no_batch(settings, monkeypatch) -> NumericsGuard:
    guard = NumericsGuard(settings)
    monkeypatch.setattr(guard, "_write_dump", lambda *arguments: "kept elsewhere")
    return guard


def asked(guard: NumericsGuard, step: int, bad: bool) -> bool:
    stage: Any = SimpleNamespace(global_step=step, stage_name="sft")
    tensor = torch.tensor(math.nan if bad else 0.0)
    return guard.passes(stage, tensor.isfinite(), [("the loss", tensor)], dict)


@given(st.lists(st.booleans(), max_size=12), st.integers(0, 3))
@pytest.mark.filterwarnings("ignore:1 of 1 values of the loss")
def test_steps_left_out_are_counted_and_too_many_in_a_row_stop(bad, most):
    in_a_row, state = 0, []
    with pytest.MonkeyPatch.context() as monkeypatch:
        for step, is_bad in enumerate(bad):
            guard = guard_that_keeps_no_batch(NumericsSettings("skip", most), monkeypatch)
            guard.restore(state)  # as from a checkpoint
            in_a_row = in_a_row + 1 if is_bad else 0
            if in_a_row > most:
                with pytest.raises(UserError, match=f"this is step {in_a_row} of its kind in a row, the run stops"):
                    asked(guard, step, is_bad)
                return
            assert asked(guard, step, is_bad) is not is_bad
            assert guard.skipped_steps == sum(bad[: step + 1])
            state = guard.state()


def test_several_minibatches_of_an_iteration_count_once(monkeypatch):
    guard = guard_that_keeps_no_batch(SKIP, monkeypatch)
    with pytest.warns(UserWarning, match="1 of 1 values of the loss are NaN or infinite in step 3 of the sft stage"):
        assert [asked(guard, 3, bad) for bad in (True, False, True)] == [False, True, False]
    assert (guard.skipped_steps, guard.skipped_in_a_row) == (1, 1)


def test_a_stopped_run_stops_again(monkeypatch):
    guard = guard_that_keeps_no_batch(NumericsSettings(), monkeypatch)
    for _ in range(2):
        with pytest.raises(UserError, match="step 0 of the sft stage; no weight was trained on them"):
            asked(guard, 0, True)


@pytest.mark.parametrize("kept_in", ["a checkpoint", "nothing"])
def test_a_resumed_run_goes_on_counting(tiny_model, files, tmp_path, kept_in):
    fault = injection.Fault(injection.gradient("policy"), 1)
    saved = ModelCheckpoint(tmp_path, filename="saved", every_n_train_steps=2, enable_version_counter=False)
    module = stages.sft(tiny_model)
    module.guard.settings = SKIP
    with pytest.warns(UserWarning, match="the gradient of"):
        stages.fit(
            module, stages.demonstrations(files), tmp_path, 2, enable_checkpointing=True, callbacks=[fault, saved]
        )
    assert module.guard.state() == [1, 1, 1]
    path = tmp_path / "saved.ckpt" if kept_in == "a checkpoint" else None
    trainer = stages.trainer(tmp_path, 3)
    trainer.fit(module, stages.demonstrations(files), ckpt_path=path)
    assert module.guard.state() == ([1, 1, 1] if path else [])
    assert ("train/skipped_steps" in trainer.callback_metrics) is (path is not None)


# Files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_that_fails_on_seven(tmp_path_factory):
    """A model whose embedding of the byte 7 is NaN: one of the twelve questions cannot be read."""
    folder = write_tiny_model(tmp_path_factory.mktemp("seven"), tie_word_embeddings=False)
    model = LlamaForCausalLM.from_pretrained(folder)
    [seven] = tiny_tokenizer().encode("7", add_special_tokens=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[seven] = torch.nan
    model.save_pretrained(folder)
    return folder


def stopped(module, data, folder, **options) -> dict[str, Any]:
    """What is in the file that a run leaves which has to stop."""
    with pytest.raises(UserError, match=r"kept in .*nonfinite/step-\d\.pt") as error:
        stages.fit(module, data, folder, steps=3, **options)
    [path] = (folder / "nonfinite").iterdir()
    assert str(path) in str(error.value)
    return torch.load(path, weights_only=True)


MAKERS = {
    "sft": (stages.sft, stages.demonstrations, "the policy's log-probabilities"),
    "dpo": (stages.dpo, stages.preferences, "the policy's log-probabilities"),
    "reward_model": (stages.reward_model, stages.preferences, "the scores"),
    "rto": (stages.rto, stages.prompts, "the policy's log-probabilities"),
}


@pytest.mark.parametrize("stage", MAKERS)
def test_a_replay_finds_what_stopped_the_run(model_that_fails_on_seven, files, tmp_path, stage, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "2")  # with which no sampled token is the byte 7
    make, data, name = MAKERS[stage]
    dump = stopped(make(model_that_fails_on_seven), data(files), tmp_path)
    assert (dump["stage"], dump["found"]["name"]) == (stage, name)
    [path] = (tmp_path / "nonfinite").iterdir()
    fresh = make(model_that_fails_on_seven)
    found = replay(fresh, path)
    first = next(iter(found))
    assert first == name
    bad = ~found[first].isfinite()
    assert (int(bad.sum()), bad.numel()) == (dump["found"]["bad"], dump["found"]["size"])
    for weight_name, weight in dump["weights"].items():
        torch.testing.assert_close(fresh.state_dict()[weight_name], weight, rtol=0, atol=0, equal_nan=True)
    assert all(weight.grad is None for weight in fresh.parameters())


@pytest.mark.parametrize("role", ["policy", "critic"])
def test_a_replay_of_a_minibatch_starts_from_the_experience_of_the_file(tiny_model, files, tmp_path, role):
    fault = injection.Fault(injection.gradient(role), 1)
    dump = stopped(stages.rto(tiny_model), stages.prompts(files), tmp_path, callbacks=[fault])
    assert dump["role"] == role and len(dump["messages"]) == 4 and sorted(dump["rows"].tolist()) == [0, 1, 2, 3]
    [path] = (tmp_path / "nonfinite").iterdir()
    fresh = stages.rto(tiny_model)
    assert replay(fresh, path) == {}  # it was not the batch's fault
    with injection.gradient(role)(fresh):
        [(name, gradient)] = replay(fresh, path).items()
    assert name == dump["found"]["name"] and int(gradient.isnan().sum()) == 1


def test_a_file_of_another_run_is_refused(tiny_model, files, tmp_path):
    stopped(stages.sft(tiny_model), stages.demonstrations(files), tmp_path, callbacks=[broken()])
    [path] = (tmp_path / "nonfinite").iterdir()
    with pytest.raises(UserError, match="is of the sft stage; replay it with that stage's module"):
        replay(stages.dpo(tiny_model), path)
    with pytest.raises(UserError, match=r"lora_A.*, which the module lacks; build it with the settings of the run"):
        replay(stages.sft(tiny_model, mode="full"), path)


def test_in_mode_full_the_file_holds_no_weights(tiny_model, files, tmp_path):
    module = stages.sft(tiny_model, mode="full")
    assert stopped(module, stages.demonstrations(files), tmp_path, callbacks=[broken()])["weights"] is None


def test_a_folder_that_cannot_be_written_hides_no_error(tiny_model, files, tmp_path):
    (tmp_path / "file").touch()
    module = stages.sft(tiny_model)
    module.guard.settings = NumericsSettings(folder=str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"the gradient of .* are NaN.* and the batch is not kept \(.*[Ff]ile"):
        stages.fit(module, stages.demonstrations(files), tmp_path, callbacks=[broken()])


def test_a_run_that_skips_keeps_the_first_batches(tiny_model, files, tmp_path, monkeypatch):
    monkeypatch.setattr("rto_lightning.modules.numerics.MOST_DUMPS", 2)
    module = stages.sft(tiny_model)
    module.guard.settings = SKIP
    fault = injection.Fault(injection.gradient("policy"), 0, 1, 2)
    with pytest.warns(UserWarning, match="not kept, since .*nonfinite holds 2 already"):
        stages.fit(module, stages.demonstrations(files), tmp_path, callbacks=[fault])
    assert sorted(path.name for path in (tmp_path / "nonfinite").iterdir()) == ["step-0.pt", "step-1.pt"]


# Beside training --------------------------------------------------------------------------------------------------


def test_statistics_leave_out_answers_without_a_finite_score():
    batches = [torch.tensor([[1.0, 2.0], [math.nan, 1.0], [3.0, math.inf]]), torch.tensor([[4.0, 5.0], [6.0, 7.0]])]
    with pytest.warns(UserWarning, match="2 of 5 answers of the reference policy have a score that is NaN"):
        kept = collect_scores(batches, lambda batch: batch, 3, SKIP)
    assert kept.tolist() == [[1.0, 2.0], [4.0, 5.0], [6.0, 7.0]]
    for settings, scores in ((NumericsSettings(), batches), (SKIP, [batches[0][1:]])):
        with pytest.raises(UserError, match=r"2 of [23] answers .* so that scores cannot be normalised"):
            collect_scores(scores, lambda batch: batch, 3, settings)


def test_metrics_of_held_out_data_are_only_warned_of(tiny_model, files, tmp_path):
    module = stages.rto(tiny_model, reward_function="tests.modules.injection:scores")
    with injection.score_of_function(math.nan)(module):
        module.configure_model()
        module.scores.normalizer().set(0.0, 1.0)
        with pytest.warns(UserWarning, match=r"after step 0 .* NaN or infinite: test/reward/score, test/reward/total,"):
            [metrics] = stages.trainer(tmp_path, 0).test(module, stages.prompts(files), verbose=False)
    assert math.isfinite(metrics["test/kl"])


def test_settings_out_of_range_are_refused():
    with pytest.raises(UserError, match=r"model\.numerics\.max_skipped_in_a_row is -1; set it to 0 or more"):
        NumericsSettings(max_skipped_in_a_row=-1)
    for settings, message in (({"max_new_tokens": 0}, "max_new_tokens is 0"), ({"samples": -5}, "samples is -5")):
        with pytest.raises(UserError, match=rf"model\.score_statistics\.{message}"):
            ScoreStatisticsSettings(**settings)
