"""Answers to fixed prompts while RTO trains: when, on the disk and in the loggers, and at no cost to training."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rto_lightning.callbacks import LogFrontier, LogRewardHistograms, LogSamples
from rto_lightning.callbacks.media import log_table
from rto_lightning.errors import UserError
from rto_lightning.inspection.samples import SAMPLES_FILE, Sample, read_samples
from rto_lightning.modules.numerics import NumericsSettings
from rto_lightning.modules.rto_settings import RewardSettings
from tests.modules import stages


def run(model: Path, files: dict[str, str], folder: Path, steps: int, module: Any = None, **options: Any) -> Any:
    """An RTO run of this many iterations, which always begins with the same weights."""
    torch.manual_seed(0)
    return stages.fit(module or stages.rto(model), stages.prompts(files), folder, steps, **options)


def watchers() -> list[Callback]:
    return [LogSamples(prompts=2, every_n_iterations=2), LogRewardHistograms(1), LogFrontier(2)]


def iterations(folder: Path) -> list[int]:
    return [sample.iteration for sample in read_samples(folder / SAMPLES_FILE)]


def test_training_is_what_it_would_be_without(tiny_model, files, tmp_path):
    logger = TensorBoardLogger(tmp_path / "logs")
    with_all = run(tiny_model, files, tmp_path / "a", 3, callbacks=watchers(), logger=logger)
    without = run(tiny_model, files, tmp_path / "b", 3)
    weights, others = with_all.kept_tensors(), without.kept_tensors()
    assert weights and all(torch.equal(weight, others[name]) for name, weight in weights.items())


def test_answers_to_the_same_prompts_over_time(tiny_model, roles, files, tmp_path):
    """Three iterations with two prompts every second one: before the first, after the second, and at the end."""
    logger = TensorBoardLogger(tmp_path, name="tb", version="")
    module = stages.full_rto(tiny_model, roles)
    run(tiny_model, files, tmp_path, 3, module, callbacks=watchers(), logger=logger, log_every_n_steps=1)
    samples = read_samples(tmp_path / SAMPLES_FILE)
    assert [sample.iteration for sample in samples] == [0, 0, 2, 2, 3, 3]
    assert [sample.rewarded.prompt[0]["content"] for sample in samples] == ["Question 0?", "Question 1?"] * 3
    first, last = samples[0], samples[-2]
    assert first.kl == pytest.approx(0.0, abs=1e-5) and abs(last.kl) > 1e-3
    rewarded = first.rewarded
    assert any(rewarded.rewards) and rewarded.score is not None
    # The reward of a response is the sum of its terms; before training the KL term is 0.
    [score] = module.scores.normalizer()(torch.tensor([rewarded.score])).tolist()
    assert first.total == pytest.approx(rewarded.total + module.rewards.beta_3 * score, rel=1e-4)
    page = (tmp_path / "samples.html").read_text(encoding="utf-8")
    assert "Before training" in page and "After 3 iterations" in page and "After 2 iterations" not in page

    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"images": 0, "histograms": 0, "tensors": 0})
    events.Reload()
    assert [event.step for event in events.Images("samples/token_rewards")] == [0, 2, 3]
    [table, *_] = [event for event in events.Tensors("samples/table/text_summary")]
    assert "Question 0?" in table.tensor_proto.string_val[0].decode().replace("\\", "")
    for term in ("token", "kl", "score", "total"):
        histograms = events.Histograms(f"histogram/reward/{term}")
        assert [event.step for event in histograms] == [0, 1, 2]
        scalars = events.Scalars(f"train/reward/{term}")
        for histogram, scalar in zip(histograms, scalars, strict=True):  # both are of the same four responses
            assert histogram.histogram_value.sum / 4 == pytest.approx(scalar.value, rel=1e-4, abs=1e-6)
    assert [event.step for event in events.Images("frontier")] == [0, 2]


def all_nan_at_first(prompts: list[Any], responses: list[str]) -> list[float]:
    """No numbers for the first training batch, of four responses; those of samples are two."""
    if len(responses) == 2 or CALLS:
        return [float(len(response)) for response in responses]
    CALLS.append(len(responses))
    return [math.nan] * len(responses)


CALLS: list[int] = []


def test_a_step_that_is_skipped_for_its_scores_ends_no_run(tiny_model, files, tmp_path):
    CALLS.clear()
    logger = TensorBoardLogger(tmp_path, name="tb", version="")
    rewards = RewardSettings(beta_1=0.0, normalize_score=False)
    options = {"rewards": rewards, "numerics": NumericsSettings(action="skip")}
    module = stages.rto(tiny_model, reward_function=f"{__name__}:all_nan_at_first", **options)
    run(tiny_model, files, tmp_path, 3, module, callbacks=watchers(), logger=logger, log_every_n_steps=1)
    assert CALLS == [4]
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"images": 0, "histograms": 0})
    events.Reload()
    assert [event.step for event in events.Histograms("histogram/reward/score")] == [1, 2]


def test_a_run_that_goes_on_has_each_answer_once(tiny_model, files, tmp_path):
    """Killed after its third iteration, and gone on from a checkpoint after the second."""

    def checkpoints() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)

    options = {"enable_checkpointing": True}
    run(tiny_model, files, tmp_path, 3, callbacks=[LogSamples(2, 1), LogFrontier(), checkpoints()], **options)
    whole = (tmp_path / SAMPLES_FILE).read_bytes()
    assert iterations(tmp_path) == [0, 0, 1, 1, 2, 2, 3, 3]
    with (tmp_path / SAMPLES_FILE).open("a") as file:
        file.write('{"iteration": 4, "ind')  # what a killed process may leave
    again, frontier = LogSamples(2, 1), LogFrontier()
    trainer = stages.trainer(tmp_path, 3, callbacks=[again, frontier, checkpoints()], **options)
    trainer.fit(stages.rto(tiny_model), stages.prompts(files), ckpt_path=tmp_path / "step=2.ckpt")
    assert (tmp_path / SAMPLES_FILE).read_bytes() == whole
    assert len(frontier.points) == 3


def test_ppo_has_no_picture_of_token_rewards(tiny_model, files, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="tb", version="")
    run(tiny_model, files, tmp_path, 1, callbacks=[LogSamples(1)], logger=logger)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert events.Tags()["images"] == []
    assert "none, since beta_1 is 0" in (tmp_path / "samples.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("callback", [LogSamples(), LogRewardHistograms(), LogFrontier()])
def test_other_stages_are_refused(tiny_model, files, tmp_path, callback):
    with pytest.raises(UserError, match=rf"{type(callback).__name__} watches rollouts, and the sft stage has none"):
        stages.fit(stages.sft(tiny_model), stages.demonstrations(files), tmp_path, callbacks=[callback])


def test_settings_without_sense_are_refused():
    with pytest.raises(UserError, match=r"LogSamples\.prompts is 0; set it to 1 or more"):
        LogSamples(prompts=0)
    for kind in (LogSamples, LogRewardHistograms, LogFrontier):
        with pytest.raises(UserError, match=rf"{kind.__name__}\.every_n_iterations is 0; set it to 1 or more"):
            kind(every_n_iterations=0)


def test_a_table_shows_texts_as_they_are(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer = stages.trainer(tmp_path, 1, logger=logger)
    log_table(trainer, "table", ["a", "b"], [["one | two\n**three**", 0.123456]], 7)
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    [event] = events.Tensors("table/text_summary")
    assert event.step == 7
    expected = "| a | b |\n| --- | --- |\n| one \\| two \\*\\*three\\*\\* | 0.1235 |"
    assert event.tensor_proto.string_val[0].decode() == expected


@pytest.mark.slow
def test_weights_and_biases_gets_table_page_and_pictures(tiny_model, roles, files, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="there is no wandb (pip install wandb)")
    from lightning.pytorch.loggers import WandbLogger

    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    logger = WandbLogger(save_dir=tmp_path, project="test")
    run(tiny_model, files, tmp_path, 1, stages.full_rto(tiny_model, roles), callbacks=watchers(), logger=logger)
    logged = {key: value for key, value in dict(logger.experiment.summary).items()}
    files_of_run = {path.suffix for path in Path(logger.experiment.dir).rglob("*.*")}
    wandb.finish()
    assert {"samples/table", "samples/page", "samples/token_rewards", "frontier", "histogram/reward/token"} <= set(
        logged
    )
    assert {".json", ".html", ".png"} <= files_of_run


def test_a_sample_is_its_row():
    from tests.inspection.made import rewarded

    sample = Sample(3, 1, rewarded(["a", " b"], [0.5, -0.25], score=1.5), kl=0.1, total=2.0, truncated=True)
    assert Sample.from_row(json.loads(json.dumps(sample.row()))) == sample
