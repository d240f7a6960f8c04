"""Win rates, and those of annotations."""

import json
import math
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rto_lightning.evaluation.annotations import annotation_rows, read_annotations
from rto_lightning.evaluation.answers import Comparison
from rto_lightning.evaluation.judging import Judgment, ScoreJudge
from rto_lightning.evaluation.questions import BenchmarkError
from rto_lightning.evaluation.table import results_table
from rto_lightning.evaluation.win_rates import model_result, win_rate

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


@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), max_size=6).map(tuple), min_size=1, max_size=12))
def test_who_wins_one_way_loses_the_other(games):
    there = win_rate([Judgment(row) for row in games])
    back = win_rate([Judgment(tuple(1.0 - game for game in row)) for row in games])
    assert (there.wins, there.losses, there.unjudged) == (back.losses, back.wins, back.unjudged)
    if there.wins + there.losses + there.ties:
        assert there.percent == pytest.approx(100.0 - back.percent)
        assert not there.low < 0.0 and not there.high > 100.0
    else:
        assert math.isnan(there.percent)


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
