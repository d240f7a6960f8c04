"""Win rates, and those of annotations."""

import json
import math
import random
import statistics
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rto_lightning.evaluation import figure
from rto_lightning.evaluation.annotations import annotation_rows, read_annotations
from rto_lightning.evaluation.answers import Comparison
from rto_lightning.evaluation.figure import save_figure
from rto_lightning.evaluation.judging import Judgment, ScoreJudge
from rto_lightning.evaluation.questions import BenchmarkError
from rto_lightning.evaluation.table import results_table
from rto_lightning.evaluation.win_rates import model_result, win_rate
from rto_lightning.figures import new_figure

FIXTURE = Path(__file__).parents[1] / "fixtures" / "alpaca_eval_annotations.json"


def test_the_win_rate_of_annotations_is_the_mean_preference():
    [result] = read_annotations(str(FIXTURE))
    # By hand: 0.0000012, 0.75, 0.02, 0.5, 0.125, a tie written as 0, 1, and one without a preference.
    shares = [0.0000012, 0.75, 0.02, 0.5, 0.125, 0.5, 1.0]
    overall = result.overall
    assert overall.percent == pytest.approx(100 * sum(shares) / 7, abs=1e-9)
    assert overall.standard_error == pytest.approx(100 * statistics.stdev(shares) / math.sqrt(7), abs=1e-9)
    assert (overall.wins, overall.ties, overall.losses, overall.unjudged) == (2, 2, 3, 1)
    assert result.categories["koala"].percent == pytest.approx(26.0)
    assert result.categories["selfinstruct"].unjudged == 1 and math.isnan(result.categories["selfinstruct"].low)
    assert result.problems == {"List the primary colours.": "the annotator gave no preference"}
    assert (result.model, result.baseline, result.judge) == ("small_model", "baseline_model", "weighted_judge")
    lengths = [len(row["output_2"]) for row in json.loads(FIXTURE.read_text(encoding="utf-8"))]
    assert result.characters == statistics.mean(lengths)


def test_annotations_are_written_as_they_were_read():
    rows = json.loads(FIXTURE.read_text(encoding="utf-8"))
    rows[5]["preference"] = 1.5  # a tie, which the file has in its older form
    [result] = read_annotations(str(FIXTURE))
    assert annotation_rows(result) == rows


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"preference": 2.5}, "Row 1 of .*2.5, which is not between 1 and 2"),
        ({"preference": "2"}, "no number"),
        ({"output_2": None}, "`output_2` is missing"),
    ],
)
def test_rows_that_are_no_annotations_are_refused(tmp_path, changes, reason):
    rows = json.loads(FIXTURE.read_text(encoding="utf-8"))
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps([rows[0] | changes, *rows[1:]]))
    with pytest.raises(BenchmarkError, match=reason):
        read_annotations(str(path))
    path.write_text(json.dumps([*rows, rows[0]]))
    with pytest.raises(BenchmarkError, match=r"on 'Name three rivers of Europe\.' more than once"):
        read_annotations(str(path))


def test_several_games_of_a_prompt_are_one_observation():
    once = win_rate([Judgment((1.0,)), Judgment((0.0,)), Judgment((0.5,))])
    often = win_rate([Judgment((1.0,) * 4), Judgment((0.0,) * 4), Judgment((0.5,) * 4)])
    assert once == often


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), max_size=6).map(tuple), min_size=1, max_size=12))
def test_who_wins_one_way_loses_the_other(games):
    there = win_rate([Judgment(row) for row in games])
    back = win_rate([Judgment(tuple(1.0 - game for game in row)) for row in games])
    assert (there.wins, there.losses, there.unjudged) == (back.losses, back.wins, back.unjudged)
    if there.wins + there.losses + there.ties:
        assert there.percent == pytest.approx(100.0 - back.percent)
        assert not there.low < 0.0 and not there.high > 100.0
        assert math.isnan(there.low) or there.low <= there.percent <= there.high
        assert (there.low, there.high) == pytest.approx((100.0 - back.high, 100.0 - back.low), nan_ok=True)
    else:
        assert math.isnan(there.percent)


def test_an_interval_is_known_where_every_prompt_is_won():
    rate = win_rate([Judgment((1.0,))] * 20)
    # Wilson's lower end is n / (n + z^2).
    assert (rate.percent, rate.high) == (100.0, 100.0) and rate.low == pytest.approx(100 * 20 / (20 + 1.96**2))
    assert rate.standard_error == 0.0
    tie = win_rate([Judgment((0.5,))] * 20)
    assert (tie.low, tie.percent, tie.high) == (50.0, 50.0, 50.0)


@pytest.mark.parametrize(("share", "games"), [(0.05, 1), (0.5, 1), (0.95, 2), (0.97, 1)])
def test_intervals_hold_the_true_rate_as_often_as_they_say(share, games):
    draw, held = random.Random(0), 0
    for _ in range(2000):
        # Games of a prompt depend on each other: half of the time they are the same.
        rows = [tuple(float(draw.random() < share) for _ in range(games)) for _ in range(40)]
        rows = [row if draw.random() < 0.5 else row[:1] * games for row in rows]
        rate = win_rate([Judgment(row) for row in rows])
        held += rate.low <= 100 * share <= rate.high
    assert 0.925 <= held / 2000 <= 0.985


def test_several_games_come_back_from_annotations(tmp_path):
    pairs = [comparison(number, "a", f"{number}") for number in range(3)]
    judgments = [Judgment((1.0, 1.0, 1.0, 0.0)), Judgment((0.0, 0.5)), Judgment((), "no verdict")]
    there = model_result("rto", "base", "judge", pairs, judgments)
    rows = [{**row, "instruction": f"{number}?"} for number, row in enumerate(annotation_rows(there))]
    assert rows[0]["preference"] == 1.75 and "games" not in rows[2]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(rows))
    [back] = read_annotations(str(path))
    assert back.overall == there.overall and back.overall.percent == pytest.approx(100 * 3.5 / 6)
    for games, reason in (([2.0], "no list of numbers"), ([0.0, 0.0], "another mean")):
        path.write_text(json.dumps([{**rows[0], "games": games}]))
        with pytest.raises(BenchmarkError, match=reason):
            read_annotations(str(path))


def test_a_figure_shows_any_name(tmp_path, recwarn):
    pairs = [comparison(number, "a", "b", f"$part_{{{number}$") for number in range(4)]
    for judgments in ([Judgment((0.0,))] * 4, [Judgment((0.5,))] * 4, [Judgment(())] * 4, [Judgment((1.0, 0.0))] * 4):
        results = [model_result(name, "$_{", "$", pairs, judgments) for name in ("_a", "$x_{", "日本語")]
        save_figure(tmp_path / "win_rates.png", results)
        assert (tmp_path / "win_rates.png").read_bytes().startswith(b"\x89PNG")
    assert not [str(found.message) for found in recwarn if "Glyph" in str(found.message) or "_" in str(found.message)]


def test_a_figure_names_each_baseline_and_judge(tmp_path, monkeypatch):
    drawn = []

    def kept(*size):
        drawn.append(new_figure(*size))
        return drawn[-1]

    monkeypatch.setattr(figure, "new_figure", kept)
    pairs = [comparison(number, "a", "b") for number in range(4)]
    results = [model_result("rto", baseline, "judge", pairs, [Judgment((0.5,))] * 4) for baseline in ("sft", "dpo")]
    save_figure(tmp_path / "one.png", results[:1])
    save_figure(tmp_path / "two.png", results)
    one, two = (
        [axes.get_xlabel(), *(t.get_text() for t in axes.get_legend().texts)] for [axes] in (f.axes for f in drawn)
    )
    assert one == [
        "win rate in percent, 95% interval; against sft (1 characters), judge: judge",
        "rto (1 characters)",
    ]
    assert two == [
        "win rate in percent, 95% interval",
        *(f"rto (1 characters), against {name} (1 characters), judge: judge" for name in ("sft", "dpo")),
    ]


def comparison(number, baseline, answer, category=""):
    return Comparison(f"id{number}", [{"role": "user", "content": "Hi"}], category, baseline, answer)


def test_the_higher_score_wins_and_no_answer_is_scored_twice():
    scores = {"a": 1.0, "b": 2.0, "c": 2.0, "x": math.nan}
    asked = []

    def scorer(prompts, texts):
        asked.append(list(texts))
        return [scores[text] for text in texts]

    judge = ScoreJudge("letters", scorer)
    pairs = [comparison(0, "a", "b"), comparison(1, "b", "a"), comparison(2, "b", "c"), comparison(3, "a", "x")]
    assert [judgment.games for judgment in judge.judge(pairs)] == [(1.0,), (0.0,), (0.5,), ()]
    assert judge.judge([comparison(0, "a", "c")])[0].games == (1.0,)
    assert asked == [["a", "b", "b", "a", "b", "c", "a", "x"], ["c"]]


def test_the_table_tells_what_is_unjudged():
    pairs = [comparison(0, "a", "bb", "koala"), comparison(1, "a", "bb", "oasst")]
    result = model_result("m", "base", "judge", pairs, [Judgment((1.0,)), Judgment((), "no verdict in 3 replies")])
    assert "m: 1 of 2 prompts are unjudged (no verdict in 3 replies)" in results_table([result])
    assert results_table([result]).splitlines()[1].split() == ["m", ":", "base", "100.00", "-", "1/0/0", "2", ":", "1"]
    assert result.summary()["win_rate"]["low"] is None  # JSON has no nan
