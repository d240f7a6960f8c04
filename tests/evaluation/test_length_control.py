"""The length-controlled win rate against `alpaca_eval`'s own function, on a fixture of the file that it downloads.

Tests that need `alpaca_eval` (extra `eval`) are slow ones, before which `.ci/run` installs it.
"""

import random
import sys

import pytest

from rto_lightning.errors import UserError
from rto_lightning.evaluation.annotations import annotation_rows
from rto_lightning.evaluation.answers import Comparison
from rto_lightning.evaluation.judging import Judgment
from rto_lightning.evaluation.length_control import INSTRUCTIONS, length_controlled
from rto_lightning.evaluation.win_rates import model_result


def result(count=INSTRUCTIONS):
    """Longer answers win more often; every tenth prompt is unjudged."""
    draw = random.Random(0)
    comparisons, judgments = [], []
    for number in range(count):
        lengths = draw.randrange(5, 200), draw.randrange(5, 200)
        baseline, answer = ("x" * length for length in lengths)
        prompt = [{"role": "user", "content": f"Question {number}?"}]
        comparisons.append(Comparison(f"Question {number}?", prompt, "koala", baseline, answer))
        share = min(max(0.4 + (lengths[1] - lengths[0]) / 400 + draw.gauss(0, 0.2), 0.0), 1.0)
        judgments.append(Judgment((share,) if number % 10 else (), "" if number % 10 else "no verdict"))
    return model_result("m", "gpt4_1106_preview", "judge", comparisons, judgments)


@pytest.mark.slow
def test_it_is_the_rate_of_alpaca_eval(tmp_path, monkeypatch):
    pandas = pytest.importorskip("pandas")
    glm = pytest.importorskip("alpaca_eval.metrics.glm_winrate")
    draw = random.Random(1)
    gamed = [
        {
            "model": model,
            "preference": draw.random(),
            "index": index,
            "std_delta_len": draw.gauss(0, 1),
            "instruction_difficulty": draw.gauss(0, 1),
            "not_gamed_baseline": False,
        }
        for model in ("concise", "verbose")
        for index in range(INSTRUCTIONS)
    ]
    path = tmp_path / "df_gamed.csv"
    pandas.DataFrame(gamed).to_csv(path, index=False)
    monkeypatch.setattr(glm, "hf_hub_download", lambda **named: str(path))
    judged = length_controlled(result())
    # As alpaca_eval reads a file of annotations that it has written itself.
    rows = [row | {"preference": float(row["preference"] or "nan")} for row in annotation_rows(result())]
    expected = glm.get_length_controlled_winrate(pandas.DataFrame.from_records(rows), save_weights_dir=None)
    assert judged.length_controlled == {name: float(expected[name]) for name in judged.length_controlled}
    assert judged.length_controlled["win_rate"] == pytest.approx(judged.overall.percent, abs=1e-9)
    assert judged.length_controlled["standard_error"] == pytest.approx(judged.overall.standard_error, abs=1e-9)
    assert abs(judged.length_controlled["length_controlled_winrate"] - judged.overall.percent) > 0.01


@pytest.mark.slow
def test_the_file_that_cannot_be_downloaded_is_named(monkeypatch):
    glm = pytest.importorskip("alpaca_eval.metrics.glm_winrate")

    def download(**named):
        raise OSError("the hub cannot be reached.")

    monkeypatch.setattr(glm, "hf_hub_download", download)
    with pytest.raises(UserError, match=r"df_gamed.csv .*\(the hub cannot be reached\)"):
        length_controlled(result())


@pytest.mark.slow
def test_other_benchmarks_have_no_such_rate():
    pytest.importorskip("alpaca_eval")
    with pytest.raises(UserError, match=r"for all 805 instructions .* m answers 8"):
        length_controlled(result(8))


def test_without_alpaca_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "alpaca_eval.metrics", None)
    with pytest.raises(UserError, match=r"pip install 'rto-lightning\[eval\]'"):
        length_controlled(result(8))
