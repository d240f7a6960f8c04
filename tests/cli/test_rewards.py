"""`rto-lightning rewards`: pages and rows from texts, predictions and pairs."""

import io
import json
from pathlib import Path

import pyarrow.parquet
import pytest

from rto_lightning.cli import main
from rto_lightning.inspection import TokenRewardReader, open_dpo_role
from tests.roles import save_random_role

PAIRS = [{"prompt": f"Question {n}?", "chosen": f"Yes {n}.", "rejected": "No <script>"} for n in range(5)]


@pytest.fixture(scope="module")
def roles(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("roles")
    dpo = save_random_role(tiny_model, folder / "dpo" / "role", "dpo")
    reward = save_random_role(tiny_model, folder / "reward" / "role", "reward")
    return str(Path(dpo).parent), str(Path(reward).parent)


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_pairs_become_rows_and_a_page(
    roles: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "pairs.jsonl", PAIRS)
    outputs = [str(tmp_path / f"rewards.{kind}") for kind in ("html", "jsonl", "parquet")]
    command = [
        "rewards",
        "--dpo",
        roles[0],
        "--reward",
        roles[1],
        "--data",
        source,
        "--shown",
        "2",
        "--batch_size",
        "1",
    ]
    assert main([*command, "--output", *outputs]) == 0
    captured = capsys.readouterr()
    told = captured.out
    assert "rewards: 100%" in captured.err and "5/5" in captured.err
    assert "responses: 10" in told and "pairs that the summed token rewards rank as labelled: " in told
    rows = [json.loads(line) for line in Path(outputs[1]).read_text(encoding="utf-8").splitlines()]
    assert [(row["index"], row["answer"]) for row in rows] == [(n, a) for n in range(5) for a in ("chosen", "rejected")]
    assert pyarrow.parquet.read_table(outputs[2]).to_pylist() == rows
    expected = TokenRewardReader(open_dpo_role(roles[0])).responses([rows[3]["prompt"]], [rows[3]["response"]])[0]
    assert rows[3]["response"] == "No <script>" and rows[3]["rewards"] == pytest.approx(expected.rewards, abs=1e-5)
    assert rows[3]["sum"] == pytest.approx(sum(rows[3]["rewards"])) and rows[3]["score"] is not None
    page = Path(outputs[0]).read_text(encoding="utf-8")
    assert page.count("<section>") == 2 and "the first 2 of 5 rows" in page and "<script>" not in page


def test_predictions_are_read_with_their_truncation(
    roles: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = [{"role": "user", "content": "Why?"}]
    rows = [{"index": 7, "prompt": prompt, "response": "So", "truncated": cut} for cut in (False, True)]
    source = write(tmp_path / "predictions.jsonl", [*rows, {"prompt": prompt, "response": ""}])
    assert main(["rewards", "--dpo", roles[0], "--data", source]) == 1
    told = capsys.readouterr().err
    assert "Row 3 of " in told and "or set bad_rows to `skip`" in told
    command = [
        "rewards",
        "--dpo",
        roles[0],
        "--data",
        source,
        "--bad_rows",
        "skip",
        "--beta_1",
        "0.5",
        "--clip",
        "0.01",
    ]
    assert main(command) == 0
    captured = capsys.readouterr()
    whole, cut = (json.loads(line) for line in captured.out.splitlines())
    assert "3/3" in captured.err
    assert whole["tokens"] == ["S", "o", "<|im_end|>"] and cut["tokens"] == ["S", "o"]
    assert whole["answer"] == "response" and whole["score"] is None and max(map(abs, whole["rewards"])) <= 0.01


def test_texts_of_the_command_line(
    roles: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("From a pipe."))
    assert main(["rewards", "--dpo", roles[0], "--prompt", "Why?", "--response", "-"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["response"] == "From a pipe." and row["sentence_ends"][-2]
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    assert main(["rewards", "--dpo", roles[0], "--prompt", "Why?", "--response", "-"]) == 1
    assert "no response on standard input" in capsys.readouterr().err
    page = tmp_path / "page.html"
    texts = ["--prompt", "Why?", "--chosen", "So.", "--rejected", "No!"]
    assert main(["rewards", "--dpo", roles[0], *texts, "--output", str(page)]) == 0
    assert "Chosen" in page.read_text(encoding="utf-8") and not capsys.readouterr().err
    long = ["--prompt", "Why?", "--response", "So. " * 99, "--output", str(tmp_path / "long.html")]
    assert main(["rewards", "--dpo", roles[0], *long]) == 0
    assert "responses without a stop token, cut off: 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "give --data, or --prompt"),
        (["--prompt", "a"], 2, "give --data, or --prompt"),
        (["--prompt", "a", "--chosen", "b"], 2, "give --data, or --prompt"),
        (["--data", "x.jsonl", "--prompt", "a"], 2, "--prompt does not go with --data"),
        (["--data", "x.jsonl", "--shown", "0"], 2, "--shown: 0 is no whole number above 0"),
        (["--data", "x.jsonl", "--clip", "-1"], 2, "--clip -1 is negative"),
        (["--data", "x.jsonl", "--clip", "nan"], 2, "--clip nan is negative or no number"),
        (["--data", "x.jsonl", "--beta_1", "inf"], 2, "--beta_1 inf is no number"),
        (["--prompt", " ", "--response", "a"], 2, "--prompt is empty"),
        (["--prompt", "a", "--response", "\udcff"], 2, "--response is not UTF-8 text"),
        (["--data", "x.jsonl", "--output", "x.html", "x.html"], 2, "--output names x.html more than once"),
        (["--data", "x.jsonl", "--output", "x.csv"], 2, "x.csv does not end with .html"),
        (["--data", "x.jsonl", "--output", "no/x.html"], 1, "the folder of no/x.html"),
        (["--data", "./x.jsonl"], 1, "There is no file"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    roles: tuple[str, str],
    arguments: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["rewards", "--dpo", roles[0], *arguments]) == status
    told = capsys.readouterr()
    assert message in told.err and len(told.err.splitlines()) == 1 and not told.out


def test_nothing_is_overwritten_and_nothing_half_is_left(
    roles: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "rewards.jsonl"
    there.write_text("mine")
    source = write(tmp_path / "pairs.jsonl", [*PAIRS, {"prompt": "a", "chosen": "b", "rejected": ""}])
    assert main(["rewards", "--dpo", roles[0], "--data", source, "--output", str(there)]) == 1
    assert "exists already" in capsys.readouterr().err and there.read_text() == "mine"
    new = [str(tmp_path / name) for name in ("new.jsonl", "new.parquet", "new.html")]
    assert main(["rewards", "--dpo", roles[0], "--data", source, "--batch_size", "1", "--output", *new]) == 1
    assert "`rejected` is empty" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl", "rewards.jsonl"]
