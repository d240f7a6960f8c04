"""The report of a pipeline: what it says, that it needs nothing else, and how it looks in a browser."""

import base64
import re
from pathlib import Path

import pytest

from rto_lightning.report import ReportedStage, write_report
from rto_lightning.report.answers import before_and_after
from tests.inspection.browser import CHROMIUM, contrast, look
from tests.inspection.made import rewarded
from tests.report.made import rto_columns, sample, write_stage

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def stages(tmp_path: Path) -> list[ReportedStage]:
    """A reward model, PPO without token rewards and RTO with them, and a function that wrote a table and a picture."""
    before, ppo, rto = (["It", " is", word] for word in (" poor", " fine", " superb"))
    blank = rewarded(before, [0.0, 0.0, 0.0], HOSTILE)
    first = rewarded(before, [0.0, 0.1, -0.4], HOSTILE)
    made = [
        write_stage(
            tmp_path,
            "reward_model",
            {
                "train/loss": [0.7, 0.6, 0.5],
                "train/score_chosen": [0.1] * 3,
                "train/accuracy": [0.5, 0.6, 0.7],
                "validation/loss": [None, 0.65],
            },
        ),
        write_stage(
            tmp_path,
            "ppo",
            rto_columns(gain=0.5),
            [sample(0, blank), sample(30, blank), sample(60, rewarded(ppo, [0.0, 0.0, 0.0], HOSTILE, score=0.5))],
        ),
        write_stage(
            tmp_path,
            "rto",
            rto_columns(),
            [sample(0, first), sample(60, rewarded(rto, [0.0, 0.1, 0.9], HOSTILE, score=1.0))],
        ),
    ]
    compare = tmp_path / "compare"
    compare.mkdir()
    table = "| policy | gold |\n| :--- | ---: |\n| RTO | 1.55 |\n| <b>bold</b> | -1 |"
    (compare / "report.md").write_text(
        f"# What came out\n\nTwo *policies*:\n\n{table}\n\n- one\n- two\n\n```\na  b\n```\n"
    )
    pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
    (compare / "learning_curves.png").write_bytes(base64.b64decode(pixel))
    return [*made, ReportedStage("compare", "run module:function", 1.0, compare)]


def write(stages: list[ReportedStage], folder: Path) -> str:
    write_report(folder / "report.html", f"Report of {HOSTILE}", {"seed": "1"}, stages)
    return (folder / "report.html").read_text(encoding="utf-8")


def test_it_says_what_came_of_each_stage(stages: list[ReportedStage], tmp_path: Path) -> None:
    page = write(stages, tmp_path)
    text = re.sub(r"<[^>]+>", " ", page)
    assert "reward_model 0.7 to 0.5 0.5 to 0.7" in " ".join(text.split())
    assert re.search(r"ppo\s+0.02083 to 0.4708", text), "means over the first and the last six of sixty iterations"
    for title in ("RTO and PPO", "Reward model", "Score against KL", "Pairs ranked as labelled", "Length of responses"):
        assert title in text
    assert "Preferences" not in text and "Entropy" not in text, "what no stage logged"
    assert "<h3>What came out</h3>" in page and "<td>RTO</td><td>1.55</td>" in page
    assert "<li>one</li><li>two</li>" in page and "<pre>a  b</pre>" in page and "Two *policies*:" in page
    assert page.count("data:image/svg+xml") == 7 and page.count("data:image/png") == 1
    assert "fit rto.yaml" in text and "12.3" in text


def test_it_needs_nothing_else_and_runs_nothing(stages: list[ReportedStage], tmp_path: Path) -> None:
    page = write(stages, tmp_path)
    assert HOSTILE not in page and "<b>bold" not in page and page.count("&lt;script&gt;") == 3
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "@import" not in page and "url(" not in page
    assert write(stages, tmp_path) == page, "the same stages give the same bytes"


def test_stages_that_began_alike_share_the_first_answer(stages: list[ReportedStage]) -> None:
    [compared] = before_and_after({stage.name: stage.folder for stage in stages})
    names = ["Before training", "ppo, after 60 iterations", "rto, after 60 iterations"]
    assert list(compared.by_name) == names
    assert compared.by_name["Before training"].rewards == [0.0, 0.1, -0.4], "with the rewards of the stage that has any"


def test_stages_that_did_not_have_one_each(stages: list[ReportedStage], tmp_path: Path) -> None:
    other = rewarded(["Quite", " other"], [0.2, 0.1], HOSTILE)
    further = write_stage(tmp_path, "rto_2", rto_columns(), [sample(0, other), sample(1, other)])
    [compared] = before_and_after({stage.name: stage.folder for stage in [*stages, further]})
    assert list(compared.by_name)[3:] == ["rto_2, before training", "rto_2, after 1 iteration"]


def test_stages_without_metrics_are_listed(tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    page = write([ReportedStage("world", "run a:b", 0.5, tmp_path / "world")], tmp_path)
    assert "<td>world</td><td>run a:b</td><td>0.5</td>" in page and "<img" not in page


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (Debian: chromium-headless-shell)")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_it_in_a_browser(stages: list[ReportedStage], tmp_path: Path, width: int, dark: bool) -> None:
    seen, _ = look(write(stages, tmp_path), tmp_path, width, dark=dark)
    assert seen["width"] == width and seen["scroll_width"] <= width and seen["scripts"] == 0
    assert {"It", "is", "superb"} <= set(seen["tokens"])
    assert min(contrast(found["colour"], found["background"]) for found in seen["texts"]) >= 4.5
