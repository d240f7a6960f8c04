"""Answers to benchmarks: the files that these read, and the same bytes however often a generation was ended."""

import json

import pytest
import yaml

from rto_lightning.errors import UserError
from rto_lightning.evaluation.annotations import read_annotations
from rto_lightning.evaluation.answer_rows import GeneratedAnswer, style_counts
from rto_lightning.evaluation.generation import GenerationSettings, generate
from rto_lightning.evaluation.questions import BenchmarkError, Question, Questions
from rto_lightning.rollout import TransformersEngine
from rto_lightning.saved.models import open_policy
from tests.roles import save_random_role

STYLE = {
    "token_len": int,
    "header_count": {f"h{level}": int for level in range(1, 7)},
    "list_count": {"ordered": int, "unordered": int},
    "bold_count": {"**": int, "__": int},
}
ALPACA_EVAL = [{"instruction": str, "output": str, "generator": str, "dataset": str}]
ARENA_HARD = {
    "arena_hard_v0.1": {
        "question_id": str,
        "answer_id": str,
        "model_id": str,
        "choices": [{"index": int, "turns": [{"content": str, "token_len": int}]}],
        "tstamp": float,
        "conv_metadata": STYLE,
    },
    "arena_hard_v2.0": {
        "uid": str,
        "ans_id": str,
        "model": str,
        "messages": [{"role": str, "content": str}, {"role": str, "content": {"answer": str}}],
        "tstamp": float,
        "metadata": STYLE,
    },
}


def no_stage(config):
    raise AssertionError("a saved role needs no stage")


@pytest.fixture(scope="module")
def policy(tiny_model):
    return open_policy(str(tiny_model), no_stage)


def questions(kind="alpaca_eval", count=5):
    columns = {"dataset": "koala"} if kind == "alpaca_eval" else {}
    texts = [f"{'What? ' * (row + 1)}" for row in range(count)]
    ids = texts if kind == "alpaca_eval" else [f"id{row}" for row in range(count)]
    return Questions(kind, [Question(*pair, "koala", columns) for pair in zip(ids, texts, strict=True)])


def settings(folder, **changes):
    return GenerationSettings(**{"name": "tiny", "output": folder, "max_new_tokens": 8, "batch_size": 2, **changes})


def schema_of(value, like):
    """The value with types in the place of what the schema has types for."""
    if isinstance(like, dict) and isinstance(value, dict):
        return {key: schema_of(item, like.get(key)) for key, item in value.items()}
    if isinstance(like, list) and isinstance(value, list):
        return [schema_of(item, like[min(place, len(like) - 1)]) for place, item in enumerate(value)]
    return type(value)


def test_alpaca_eval_gets_a_list_of_outputs(policy, tmp_path):
    done = generate(*policy, questions(), settings(tmp_path))
    assert done.path == tmp_path / "model_outputs.json"
    rows = json.loads(done.path.read_text(encoding="utf-8"))
    assert schema_of(rows, ALPACA_EVAL) == ALPACA_EVAL * 5
    assert [row["instruction"] for row in rows] == [row.text for row in questions().rows]
    assert [row["output"] for row in rows] == [answer.text for answer in done.answers]


@pytest.mark.parametrize("kind", list(ARENA_HARD))
def test_arena_hard_gets_a_line_for_each_question(policy, tmp_path, kind):
    done = generate(*policy, questions(kind), settings(tmp_path), now=1.5e9)
    assert done.path == tmp_path / "model_answer" / "tiny.jsonl"
    rows = [json.loads(line) for line in done.path.read_text(encoding="utf-8").splitlines()]
    assert [schema_of(row, ARENA_HARD[kind]) for row in rows] == [ARENA_HARD[kind]] * 5
    if kind == "arena_hard_v2.0":
        assert [row["messages"][0]["content"] for row in rows] == [row.text for row in questions(kind).rows]
        assert [row["messages"][-1]["content"]["answer"] for row in rows] == [answer.text for answer in done.answers]
    else:
        assert [row["choices"][0]["turns"][0]["content"] for row in rows] == [answer.text for answer in done.answers]


def test_arena_hard_is_answered_greedily_and_alpaca_eval_by_seeds(policy, tmp_path):
    def texts(kind, **changes):
        folder = tmp_path / f"{kind}{changes}"
        return [answer.text for answer in generate(*policy, questions(kind), settings(folder, **changes)).answers]

    assert texts("alpaca_eval") != texts("alpaca_eval", seed=1)
    assert texts("arena_hard_v2.0") == texts("arena_hard_v2.0", seed=1) == texts("alpaca_eval", temperature=0.0)


class Ended(Exception):
    """In the place of the death of a process."""


@pytest.mark.parametrize("kind", ["alpaca_eval", "arena_hard_v2.0"])
@pytest.mark.parametrize("torn", [b"", b'[{"text": "cut o'])
def test_a_generation_that_was_ended_goes_on_to_the_same_bytes(policy, tmp_path, monkeypatch, kind, torn):
    through = generate(*policy, questions(kind), settings(tmp_path / "through", temperature=1.0), now=7.0)
    rollout, calls = TransformersEngine.rollout, []

    def dies(*args, **named):
        calls.append(1)
        if len(calls) == 3:
            raise Ended
        return rollout(*args, **named)

    monkeypatch.setattr(TransformersEngine, "rollout", dies)
    ended = settings(tmp_path / "ended", temperature=1.0)
    with pytest.raises(Ended):
        generate(*policy, questions(kind), ended, now=7.0)
    [unfinished] = (tmp_path / "ended").rglob("*.unfinished.jsonl")
    with unfinished.open("ab") as file:
        file.write(torn)
    done = generate(*policy, questions(kind), ended, now=8.0)
    assert (done.resumed, len(calls)) == (4, 4)
    assert done.path.read_bytes() == through.path.read_bytes()
    assert not unfinished.exists()


def answer_once(monkeypatch):
    """The engine dies after its first batch."""
    rollout, calls = TransformersEngine.rollout, []

    def dies(*args, **named):
        calls.append(1)
        if len(calls) > 1:
            raise Ended
        return rollout(*args, **named)

    monkeypatch.setattr(TransformersEngine, "rollout", dies)


def test_nothing_stands_in_the_way_before_the_first_answers_are_there(policy, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "rollout", lambda *args, **named: (_ for _ in ()).throw(Ended))
        with pytest.raises(Ended):
            generate(*policy, questions(), settings(tmp_path))
    assert len(generate(*policy, questions(), settings(tmp_path, seed=3)).answers) == 5


def test_answers_of_other_settings_are_not_mixed(policy, tiny_model, tmp_path, monkeypatch):
    answer_once(monkeypatch)
    with pytest.raises(Ended):
        generate(*policy, questions(), settings(tmp_path))
    with pytest.raises(UserError, match="another seed and temperature"):
        generate(*policy, questions(), settings(tmp_path, seed=3, temperature=0.1))
    other = open_policy(save_random_role(tiny_model, tmp_path / "role", "policy"), no_stage)
    with pytest.raises(UserError, match="another model"):
        generate(*other, questions(), settings(tmp_path))


def test_what_cannot_be_generated_is_refused(policy, tmp_path):
    with pytest.raises(UserError, match="set --max_new_tokens to 207 or less"):
        generate(*policy, questions(), settings(tmp_path, max_new_tokens=4096))
    with pytest.raises(UserError, match="cannot be the name of a file"):
        generate(*policy, questions("arena_hard_v2.0"), settings(tmp_path, name="meta/llama"))
    for name, reason in (("a" * 250, "too long"), ("a\nb", "cannot be the name"), (".", "cannot be the name")):
        with pytest.raises(UserError, match=reason):
            generate(*policy, questions("arena_hard_v2.0"), settings(tmp_path, name=name))
    long = Questions("arena_hard_v2.0", [Question(f"id{n}", "What? " * n * 10) for n in (1, 8)])
    with pytest.raises(BenchmarkError, match=r"the questions 'id8' have as many tokens as the model takes, 256"):
        generate(*policy, long, settings(tmp_path))
    assert not list(tmp_path.iterdir())
    (tmp_path / "model_outputs.json").write_text("[]")
    with pytest.raises(UserError, match="exists already"):
        generate(*policy, questions(), settings(tmp_path))


def test_style_is_counted_outside_of_code():
    text = "# Title\n## Part\n1. one\n2. two\n- three\n**bold** and __this__\n```\n# no title\n- no item\n```"
    counts = style_counts(GeneratedAnswer(text, 30, False))
    assert counts["token_len"] == 30
    assert counts["header_count"] == {"h1": 1, "h2": 1, "h3": 0, "h4": 0, "h5": 0, "h6": 0}
    assert counts["list_count"] == {"ordered": 2, "unordered": 1}
    assert counts["bold_count"] == {"**": 1, "__": 1}
    # As Arena-Hard counts: what stands in a block of code is taken away wherever it stands.
    assert style_counts(GeneratedAnswer("# A\n```# A\n```", 3, False))["header_count"]["h1"] == 0


def later_of_two(prompts, **_):
    """What a judge completes that prefers the later answer in the alphabet, as alpaca_eval asks for completions."""
    answers = [prompt.split("<1>")[1].split("<2>") for prompt in prompts]
    completions = ["first" if first > second else "second" for first, second in answers]
    nothing = [0.0] * len(prompts)
    return {"completions": completions, "price_per_example": nothing, "time_per_example": nothing}


@pytest.mark.slow
def test_alpaca_eval_itself_judges_what_was_generated(policy, tmp_path, monkeypatch):
    """And its annotations are read here, with its win rate."""
    alpaca_eval = pytest.importorskip("alpaca_eval")
    from alpaca_eval.annotators import base

    monkeypatch.setattr(base, "get_fn_completions", lambda name: later_of_two)
    judge = {
        "prompt_template": "judge/prompt.txt",
        "fn_completions": "by_alphabet",
        "completions_kwargs": {},
        "fn_completion_parser": "regex_parser",
        "completion_parser_kwargs": {"outputs_to_match": {1: "first", 2: "second"}},
    }
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge/prompt.txt").write_text("{instruction}<1>{output_1}<2>{output_2}")
    (tmp_path / "judge/configs.yaml").write_text(yaml.safe_dump({"judge": judge}))
    files = [
        generate(*policy, questions(), settings(tmp_path / name, name=name, seed=seed, temperature=1.0)).path
        for seed, name in enumerate(("ours", "theirs"))
    ]
    leaderboard, annotations = alpaca_eval.evaluate(
        *files,
        annotators_config=str(tmp_path / "judge"),
        base_dir=tmp_path,
        fn_metric="get_winrate",
        metric_kwargs={},
        sort_by="win_rate",
        is_return_instead_of_print=True,
        output_path=None,
        caching_path=None,
        precomputed_leaderboard=None,
        is_cache_leaderboard=False,
    )
    ours, theirs = ([row["output"] for row in json.loads(path.read_text(encoding="utf-8"))] for path in files)
    wins = sum(one > other for one, other in zip(ours, theirs, strict=True))
    assert 0 < wins < 5 and leaderboard.loc["ours", "win_rate"] == 100 * wins / 5
    (tmp_path / "annotations.json").write_text(json.dumps(annotations))
    [result] = read_annotations(str(tmp_path / "annotations.json"))
    assert (result.model, result.baseline) == ("ours", "theirs")
    assert result.overall.percent == 100 * wins / 5
