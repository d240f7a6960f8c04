"""`rto-lightning predict`: one JSON line an answer, in a file that is never written over."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from rto_lightning.callbacks import WritePredictions
from rto_lightning.cli import main
from rto_lightning.errors import UserError

QUESTIONS = [f"{word}?" for word in ("Größe", "色", "two\nlines", '"quoted"', "plain")]


@pytest.fixture
def config(tiny_model, tmp_path, monkeypatch) -> Path:
    """An RTO stage that answers five prompts in batches of two, and writes to `out`."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": question}) + "\n" for question in QUESTIONS))
    model = {
        "backbone": {"model": str(tiny_model)},
        "reward_function": "tests.modules.stages:count_exclamations",
        "rollout": {"max_new_tokens": 5},
        "rewards": {"beta_1": 0.0},
        "critic": {"init": "policy"},
    }
    data = {"predict": "prompts.jsonl", "batch_size": 2}
    settings = {
        "trainer": {"default_root_dir": "out", "accelerator": "cpu", "enable_progress_bar": False},
        "model": {"class_path": "rto_lightning.modules.RTOModule", "init_args": model},
        "data": {"class_path": "rto_lightning.data.PromptDataModule", "init_args": data},
    }
    Path("rto.yaml").write_text(yaml.safe_dump(settings))
    return Path("rto.yaml")


def predict(config: Path, *options: str) -> int:
    return main(["predict", "--config", str(config), *options])


def test_each_prompt_gets_a_line_in_its_order(config, capsys) -> None:
    assert predict(config) == 0
    assert "answers: out/predictions.jsonl" in capsys.readouterr().out
    text = Path("out/predictions.jsonl").read_text(encoding="utf-8")
    assert "Größe?" in text and "色?" in text  # as they were written, not escaped
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": question}] for question in QUESTIONS]
    assert all(set(row) == {"index", "prompt", "response", "truncated"} for row in rows)
    assert len({row["response"] for row in rows}) > 1
    assert all(isinstance(row["truncated"], bool) for row in rows)


def test_answers_do_not_depend_on_the_batch(config) -> None:
    predict(config)
    predict(config, "--trainer.default_root_dir=again", "--data.batch_size=5")
    one, other = (Path(folder, "predictions.jsonl").read_text(encoding="utf-8") for folder in ("out", "again"))
    assert one == other
    predict(config, "--trainer.default_root_dir=seed", "--model.seed=2")
    assert Path("seed/predictions.jsonl").read_text(encoding="utf-8") != one


def test_an_existing_file_is_refused_and_kept(config, capsys) -> None:
    path = Path("out/predictions.jsonl")
    path.parent.mkdir()
    path.write_text("precious\n")
    assert predict(config) == 1
    captured = capsys.readouterr()
    assert captured.err == (
        "rto-lightning: error: out/predictions.jsonl exists already; remove it or choose another "
        "--trainer.default_root_dir.\n"
    )
    assert "answers:" not in captured.out
    assert path.read_text() == "precious\n"


def test_each_of_several_ranks_has_a_file(tmp_path) -> None:
    for rank in (0, 1):
        callback = WritePredictions(tmp_path / "new/predictions.jsonl")
        callback.on_predict_start(SimpleNamespace(world_size=2, global_rank=rank), None)
        callback.write_on_batch_end(None, None, [{"rank": rank}], None, None, 0, 0)
        callback.write_on_batch_end(None, None, [{"rank": rank, "batch": 1}], None, None, 1, 0)
    assert {path.name: path.read_text().count("\n") for path in (tmp_path / "new").iterdir()} == {
        "predictions.0.jsonl": 2,
        "predictions.1.jsonl": 2,
    }
    with pytest.raises(UserError, match=r"predictions\.1\.jsonl exists already"):
        WritePredictions(tmp_path / "new/predictions.jsonl").on_predict_start(
            SimpleNamespace(world_size=2, global_rank=1), None
        )
