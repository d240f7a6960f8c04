"""The preference stage with cached log-probabilities of its reference: the same training, without the forwards."""

import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rto_lightning.backbone import PolicyBackbone
from rto_lightning.cli import main
from rto_lightning.data import PreferenceDataModule
from rto_lightning.errors import UserError
from rto_lightning.modules.reference_cache import check_cacheable
from tests.modules import stages

OPTIONS = {"logger": True, "log_every_n_steps": 1, "check_val_every_n_epoch": 1}


@pytest.fixture
def forwards(monkeypatch):
    """The roles whose log-probabilities were computed, and whether under autocast, one entry for each forward."""
    roles = []
    compute = PolicyBackbone.token_logprobs

    def counted(self, name, *args, **options):
        roles.append((name, torch.is_autocast_enabled("cpu")))
        return compute(self, name, *args, **options)

    monkeypatch.setattr(PolicyBackbone, "token_logprobs", counted)
    return roles


def count(forwards, role):
    return sum(name == role for name, _ in forwards)


def pairs(files, **options):
    sources = dict.fromkeys(("train", "validation", "test"), files["preferences"])
    return PreferenceDataModule(**{**sources, "eval_batch_size": 5, "max_eval_rows": 7, **stages.LIMITS, **options})


def fit(model, files, folder, cache, steps=7, loss="dpo", **options):
    """Trains over epochs of three steps; returns the module and the figures of each step and of the validation."""
    torch.manual_seed(0)
    module = stages.dpo(model, loss=loss, options={"reference_cache": cache}, **options)
    recorder = stages.Recorder()
    stages.fit(module, pairs(files), folder, steps, callbacks=[recorder], **OPTIONS)
    return module, [*recorder.metrics, {name: float(value) for name, value in module.trainer.callback_metrics.items()}]


@pytest.mark.parametrize(
    ("mode", "dtype", "loss", "tolerance"),
    [
        ("adapters", "float32", "rdpo", 1e-6),
        ("adapters", "float64", "ipo", 1e-12),
        ("full", "float32", "dpo", 1e-6),
        ("full", "float64", "dpo", 1e-12),
    ],
)
def test_training_is_that_without_the_cache(tiny_model, files, tmp_path, forwards, mode, dtype, loss, tolerance):
    settings = {"mode": mode, "dtype": dtype, "loss": loss}
    if dtype == "float64":
        settings["attention"] = "eager"
    _, expected = fit(tiny_model, files, tmp_path, None, steps=3, **settings)
    assert count(forwards, "reference") == count(forwards, "policy") > 0
    forwards.clear()
    _, actual = fit(tiny_model, files, tmp_path, str(tmp_path / "cache"), steps=3, **settings)
    assert count(forwards, "reference") == 3 + 2  # 12 and 7 pairs, 5 at a time
    for before, after in zip(expected, actual, strict=True):
        assert before.keys() == after.keys() and "train/logprob_chosen" in before
        for name, value in before.items():
            assert after[name] == pytest.approx(value, rel=0, abs=tolerance * max(1, abs(value))), name
    assert {"validation/loss", "validation/margin", "train/loss"} <= actual[-1].keys()


def test_later_epochs_and_runs_read_no_reference(tiny_model, files, tmp_path, forwards):
    cache = str(tmp_path / "cache")
    _, first = fit(tiny_model, files, tmp_path, cache)
    assert forwards[:5] == [("reference", False)] * 5 and count(forwards, "reference") == 5
    forwards.clear()
    module, second = fit(tiny_model, files, tmp_path, cache)
    assert count(forwards, "reference") == 0 and second == first
    assert module._references == {}  # so that no other task is served with them

    files_of_splits = {path: path.stat().st_mtime_ns for path in Path(cache).iterdir()}
    assert len(files_of_splits) == 2
    module = stages.dpo(tiny_model, options={"reference_cache": cache})
    stages.trainer(tmp_path, 0).validate(module, pairs(files), verbose=False)
    stages.trainer(tmp_path, 0).test(module, pairs(files), verbose=False)
    fit(tiny_model, files, tmp_path, cache, loss="ipo", steps=1)
    assert count(forwards, "reference") == 0 and count(forwards, "policy") > 0
    assert files_of_splits == {path: path.stat().st_mtime_ns for path in Path(cache).iterdir()}


def test_other_data_or_another_reference_are_read_anew(tiny_model, files, tmp_path, forwards):
    cache = str(tmp_path / "cache")
    fit(tiny_model, files, tmp_path, cache, steps=1)
    sft = stages.fit(stages.sft(tiny_model), stages.demonstrations(files), tmp_path, steps=2)
    sft.save_role(tmp_path / "sft")
    forwards.clear()
    fit(tiny_model, files, tmp_path, cache, steps=1, init=str(tmp_path / "sft"))
    assert count(forwards, "reference") == 5 and len(list(Path(cache).iterdir())) == 4
    module = stages.dpo(tiny_model, options={"reference_cache": cache})
    stages.fit(module, pairs(files, max_response_tokens=3, validation=None), tmp_path, 1)
    assert count(forwards, "reference") == 8 and len(list(Path(cache).iterdir())) == 5


def test_mode_full_holds_no_reference_while_training(tiny_model, files, tmp_path, monkeypatch):
    loaded = []
    add_role = PolicyBackbone.add_role

    def watched(self, name, *args, **options):
        add_role(self, name, *args, **options)
        if name == "reference":
            loaded.append(weakref.ref(self.models[self.roles[name].model]))

    monkeypatch.setattr(PolicyBackbone, "add_role", watched)

    class Held(stages.Recorder):
        def on_train_batch_start(self, trainer, module, *args):
            held = [reference() for reference in loaded]
            assert loaded and held == [None] * len(held)
            assert set(module.backbone.models) == set(module.backbone.roles) == {"policy"}
            super().on_train_batch_end(trainer)

    recorder = Held()
    module = stages.dpo(tiny_model, mode="full", options={"reference_cache": str(tmp_path / "cache")})
    stages.fit(module, pairs(files), tmp_path, 2, callbacks=[recorder], **OPTIONS)
    assert len(recorder.metrics) == 4


@pytest.mark.parametrize("mode", ["adapters", "full"])
def test_reference_is_computed_under_the_precision_of_the_run(tiny_model, files, tmp_path, forwards, mode):
    cache = str(tmp_path / "cache")
    for precision in ("32-true", "bf16-mixed"):
        forwards.clear()
        module = stages.dpo(tiny_model, mode=mode, options={"reference_cache": cache})
        stages.fit(module, pairs(files), tmp_path, 1, precision=precision)
        references = [autocast for name, autocast in forwards if name == "reference"]
        assert references == [precision == "bf16-mixed"] * 5  # each precision is a key of its own
    assert len(list(Path(cache).iterdir())) == 4


@pytest.mark.parametrize("loss", ["dpo", "simpo"])
@pytest.mark.parametrize("mode", ["adapters", "full"])
def test_test_reports_the_same(tiny_model, files, tmp_path, forwards, loss, mode):
    reports = []
    for cache in (None, str(tmp_path / "cache")):
        torch.manual_seed(0)
        module = stages.dpo(tiny_model, loss=loss, mode=mode, dtype="float64", options={"reference_cache": cache})
        stages.fit(module, pairs(files, validation=None), tmp_path, 3)
        if loss == "simpo":
            assert count(forwards, "reference") == 0 and not (tmp_path / "cache").exists()
        [report] = stages.trainer(tmp_path, 0).test(module, pairs(files), verbose=False)
        reports.append(report)
        forwards.clear()
    assert reports[0].keys() == reports[1].keys()
    for name, value in reports[0].items():
        assert reports[1][name] == pytest.approx(value, rel=0, abs=1e-9), name


def test_quick_check_of_one_batch_computes_no_cache(tiny_model, files, tmp_path):
    module = stages.dpo(tiny_model, mode="full", options={"reference_cache": str(tmp_path / "cache")})
    stages.fit(module, pairs(files), tmp_path, 1, fast_dev_run=True)
    assert not (tmp_path / "cache").exists()


def test_validation_that_is_switched_off_is_not_computed(tiny_model, files, tmp_path, forwards):
    module = stages.dpo(tiny_model, options={"reference_cache": str(tmp_path / "cache")})
    stages.fit(module, pairs(files), tmp_path, 1, limit_val_batches=0)
    assert count(forwards, "reference") == 3


# What it does not go with.


@pytest.mark.parametrize("loss", ["tdpo1", "tdpo2"])
def test_loss_that_reads_the_whole_vocabulary_is_refused(tiny_model, loss):
    with pytest.raises(UserError, match=f"reference_cache does not go with loss {loss}.* set it to null"):
        stages.dpo(tiny_model, loss=loss, options={"reference_cache": "cache"})


def test_loaders_of_unknown_pairs_are_refused(tiny_model, files, tmp_path):
    data = pairs(files)
    module = stages.dpo(tiny_model, options={"reference_cache": str(tmp_path / "cache")})
    data.chat = module.chat
    data.setup("fit")
    with pytest.raises(UserError, match="give the trainer a PreferenceDataModule"):
        stages.trainer(tmp_path, 1).fit(module, data.train_dataloader())


def test_several_devices_are_refused():
    with pytest.raises(UserError, match=r"set trainer\.devices to 1"):
        check_cacheable(SimpleNamespace(world_size=2, datamodule=PreferenceDataModule()))


def test_a_stream_is_refused():
    with pytest.raises(UserError, match=r"data\.streaming reads them while training; set one of them to null or false"):
        check_cacheable(SimpleNamespace(world_size=1, datamodule=PreferenceDataModule(streaming=True)))


# The command.


@pytest.fixture
def command(tiny_model, files, tmp_path):
    config = {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 5,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
        },
        "model": {
            "class_path": "rto_lightning.modules.PreferenceModule",
            "init_args": {
                "backbone": {"model": str(tiny_model), "mode": "full"},
                "reference_cache": str(tmp_path / "cache"),
                "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-2}},
            },
        },
        "data": {
            "class_path": "rto_lightning.data.PreferenceDataModule",
            "init_args": {"train": files["preferences"], "validation": files["preferences"], "batch_size": 4},
        },
    }
    path = tmp_path / "dpo.yaml"
    path.write_text(json.dumps(config))

    def run(name, *options, status=0):
        folder = tmp_path / name
        assert main(["fit", "--config", str(path), "--trainer.default_root_dir", str(folder), *options]) == status
        return folder

    return run


def test_second_run_of_the_command_reads_no_reference(command, forwards):
    first = command("first")
    assert count(forwards, "reference") == 3 and count(forwards, "policy") > 0
    forwards.clear()
    second = command("second")
    assert count(forwards, "reference") == 0 and count(forwards, "policy") > 0

    tables = [(folder / "metrics" / "fit" / "metrics.csv").read_text() for folder in (first, second)]
    assert tables[0] == tables[1]
    weights = [(folder / "role" / "model.safetensors").read_bytes() for folder in (first, second)]
    assert weights[0] == weights[1]


def test_run_is_resumed_as_if_it_had_not_stopped(command, forwards, tmp_path):
    checkpoints = {"dirpath": tmp_path, "filename": "{step}", "every_n_train_steps": 2, "save_top_k": -1}
    options = [f"--trainer.callbacks.{name}={value}" for name, value in checkpoints.items()]
    whole = command("whole", "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint", *options)
    forwards.clear()
    resumed = command("resumed", "--ckpt_path", str(tmp_path / "step=2.ckpt"))
    assert count(forwards, "reference") == 0 and count(forwards, "policy") > 0
    weights = [(folder / "role" / "model.safetensors").read_bytes() for folder in (whole, resumed)]
    assert weights[0] == weights[1]


def test_folder_that_cannot_be_written_to_is_one_sentence(command, capsys, tmp_path):
    (tmp_path / "cache").write_text("a file")
    command("out", status=1)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1 and lines[0].endswith("name a folder that can be written to.")
