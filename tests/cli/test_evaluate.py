"""`rto-lightning generate` and `evaluate` as they are typed."""

import json
import math
from pathlib import Path

import pytest

from rto_lightning.cli import main
from rto_lightning.evaluation.answer_rows import GeneratedAnswer
from rto_lightning.evaluation.generation import Generation
from rto_lightning.rewards.remote import RewardServer, ServedRole
from tests.evaluation.test_chat_judge import JudgeServer
from tests.evaluation.test_win_rates import FIXTURE
from tests.models import make_backbone, write_tiny_classifier
from tests.rewards.services import running
from tests.roles import save_random_role

QUESTIONS = ["Who?", "What is it?", "Why not?"]


def longest(prompts, responses):
    """A reward function: the longer answer is better."""
    assert [prompt[0]["content"] for prompt in prompts if len(prompt) == 1]
    return [float(len(response)) for response in responses]


def nonsense(prompts, responses):
    """A reward function that knows no scores."""
    return [math.nan if response == "Me, Ann." else 1.0 for response in responses]


def unasked(prompts, responses):
    """A reward function that must not be called."""
    raise AssertionError


@pytest.fixture
def answers(tmp_path):
    """Files of AlpacaEval's format of a baseline and a model."""
    paths = []
    for name, texts in (("base", ["Me.", "A thing.", "Because."]), ("rto", ["Me, Ann.", "It.", "Because."])):
        rows = [
            {"instruction": question, "output": text, "generator": name, "dataset": f"part {len(question) % 2}"}
            for question, text in zip(QUESTIONS, texts, strict=True)
        ]
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(rows))
    return [str(path) for path in paths]


@pytest.fixture
def run(capsys):
    """Runs a command; returns its status, what it printed, and its error."""

    def command(*args):
        status = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command


def test_a_function_judges(run, answers, tmp_path):
    base, rto = answers
    function = "tests.cli.test_evaluate:longest"
    output = tmp_path / "judged"
    status, out, _ = run("evaluate", rto, "--baseline", base, "--reward_function", function, "--output", output)
    assert status == 0 and "rto : base     50.00" in out and "1/1/1" in out and "part 0" in out
    [summary] = json.loads((output / "win_rates.json").read_text())
    assert summary["win_rate"]["percent"] == 50.0 and summary["judge"] == function
    assert (output / "win_rates.png").read_bytes().startswith(b"\x89PNG")
    status, again, _ = run("evaluate", "--annotations", output / "annotations.json")
    assert status == 0 and again.splitlines()[1] == out.splitlines()[1]
    status, _, err = run("evaluate", "--annotations", FIXTURE, "--output", output)
    assert status == 1 and "holds win rates already" in err


def test_unjudged_answers_are_reported(run, answers):
    function = "tests.cli.test_evaluate:nonsense"
    status, out, _ = run("evaluate", answers[1], "--baseline", answers[0], "--reward_function", function)
    assert status == 0 and "rto: 1 of 3 prompts are unjudged (an answer has no finite score)" in out


def test_a_chat_model_judges_and_goes_on_where_it_was_ended(run, answers, tmp_path):
    base, rto = answers
    status = [402]

    def reply(request, number):
        if number > 2 and status[0] != 200:
            return status[0], "no credit"
        return "[[A>>B]]" if number % 2 else "[[B>A]]"

    with running(JudgeServer(reply)) as server:
        how = (
            "--judge_url",
            server.url,
            "--judge_model",
            "judge-1",
            "--judge_prompt",
            "arena_hard",
            "--concurrency",
            1,
        )
        command = ("evaluate", rto, "--baseline", base, *how, "--output", tmp_path / "judged")
        ended, out, err = run(*command)
        assert (ended, out) == (1, "") and "402 Payment Required: no credit" in err and "goes on with the others" in err
        status[0] = 200
        ended, out, err = run(*command)
        assert ended == 0 and "rto : base" in out and "33%" in err and len(server.requests) == 3 + 4
    names = sorted(path.name for path in (tmp_path / "judged").iterdir())
    assert names == ["annotations.json", "win_rates.json", "win_rates.png"]
    status, again, _ = run("evaluate", "--annotations", tmp_path / "judged" / "annotations.json")
    assert status == 0 and again.splitlines()[1] == out.splitlines()[1]


def test_a_judge_is_not_asked_for_what_cannot_be_written_or_controlled(run, answers, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    asked = ("--baseline", answers[0], "--reward_function", "tests.cli.test_evaluate:unasked")
    status, _, err = run("evaluate", answers[1], *asked, "--output", tmp_path / "file")
    assert status == 1 and "cannot be made (File exists)" in err
    monkeypatch.setattr("rto_lightning.evaluation.length_control.check_length_control", lambda: None)
    status, _, err = run("evaluate", answers[1], *asked, "--length_controlled")
    assert status == 1 and "rto answers 3; leave it out" in err


def test_reward_models_judge_alike_in_process_and_as_a_service(run, answers, tiny_model, tmp_path):
    base, rto = answers
    role = save_random_role(tiny_model, tmp_path / "reward", "reward")
    status, out, _ = run("evaluate", rto, "--baseline", base, "--reward", role, "--device", "cpu")
    assert status == 0
    backbone = make_backbone(tiny_model, dtype="float32")
    backbone.add_role("reward", role, scalar_head=True)
    with running(RewardServer(("127.0.0.1", 0), ServedRole(backbone, "reward", 2), None, 2**20, 100)) as server:
        asked = ("--reward_url", server.url, "--tokenizer", tiny_model)
        status, by_service, _ = run("evaluate", rto, "--baseline", base, *asked)
    assert status == 0 and by_service == out
    outside = write_tiny_classifier(tmp_path / "outside")
    status, out, _ = run("evaluate", rto, "--baseline", base, "--reward", outside, "--device", "cpu")
    assert status == 0 and "unjudged" not in out


def test_answers_that_do_not_fit_end_with_status_2_and_their_ids(run, answers):
    base, rto = answers
    Path(rto).write_text(json.dumps(json.loads(Path(rto).read_text())[1:]))
    status, out, err = run("evaluate", rto, "--baseline", base, "--reward_function", "tests.cli.test_evaluate:longest")
    assert (status, out) == (2, "") and err.count("\n") == 1 and "does not answer 'Who?' of " in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("a.json",), "give one judge of --reward,"),
        (("a.json", "--reward", "r", "--judge_url", "http://h"), "not 2"),
        (("a.json", "--reward", "r"), "those of --baseline"),
        (("a.json", "--baseline", "b.json", "--judge_url", "http://h"), "--judge_url needs --judge_model"),
        (("a.json", "--baseline", "b.json", "--reward_url", "http://h"), "--reward_url needs --tokenizer"),
        (
            ("a.json", "--baseline", "b.json", "--reward_url", "h:1", "--tokenizer", "t"),
            "--reward_url is no HTTP address",
        ),
        (("a.json", "--baseline", "b.json", "--judge_url", "http://h", "--judge_model", "m"), "needs --output"),
        (("a.json", "--annotations", "b.json"), "--annotations holds answers already"),
    ],
)
def test_what_does_not_go_together_is_said(run, args, message):
    status, _, err = run("evaluate", *args)
    assert status == 2 and message in err


def test_a_role_answers_and_is_judged(run, tiny_model, tmp_path):
    questions = tmp_path / "question.jsonl"
    rows = [
        {"uid": f"u{number}", "prompt": text, "category": f"part {number % 2}"} for number, text in enumerate(QUESTIONS)
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    role = save_random_role(tiny_model, tmp_path / "stage" / "role", "policy")
    how = ("--questions", questions, "--max_new_tokens", 6, "--batch_size", 2, "--device", "cpu", "--temperature", 1)
    files = []
    for source, name in ((tiny_model, "base"), (tmp_path / "stage", "rto"), (role, "same")):
        status, out, _ = run("generate", source, "--name", name, "--output", tmp_path, *how)
        assert status == 0 and "3 answers" in out
        files.append(tmp_path / "model_answer" / f"{name}.jsonl")
    texts = [[json.loads(line)["messages"][-1]["content"] for line in file.open()] for file in files]
    assert texts[1] == texts[2] != texts[0]
    function = ("--reward_function", "tests.cli.test_evaluate:longest")
    status, out, _ = run("evaluate", *files[1:], "--baseline", files[0], "--questions", questions, *function)
    assert status == 0 and "rto : base" in out and "same : base" in out and "part 1" in out


def test_wrong_questions_end_with_status_2(run, tiny_model, tmp_path):
    questions = tmp_path / "eval.json"
    questions.write_text(json.dumps([{"instruction": "Hi"}] * 2))
    how = ("--questions", questions, "--name", "a", "--output", tmp_path, "--device", "cpu")
    status, _, err = run("generate", tiny_model, *how)
    assert status == 2 and "has 'Hi' more than once" in err
    assert run("generate", tiny_model, "--name", "a")[0] == 2


def test_answers_that_are_empty_or_cut_off_are_told_and_those_under_way_kept(run, tmp_path, monkeypatch):
    questions = tmp_path / "eval.json"
    questions.write_text(json.dumps([{"instruction": text} for text in QUESTIONS]))
    made = [GeneratedAnswer("a", 1, False), GeneratedAnswer(" ", 1, False), GeneratedAnswer("b", 6, True)]
    path = tmp_path / "answers" / "model_outputs.json"
    monkeypatch.setattr("rto_lightning.cli.models.load_policy", lambda options: ("backbone", "policy"))
    how = ("--questions", questions, "--name", "a", "--output", path.parent, "--max_new_tokens", 6)
    monkeypatch.setattr("rto_lightning.evaluation.generation.generate", lambda *args: Generation(path, made, 2))
    status, out, _ = run("generate", "model", *how)
    assert (
        status == 0 and "3 answers of a, 2 of them from before" in out and "1 answers were cut off at 6 tokens" in out
    )
    assert "1 answers are empty, which evaluate refuses: to 'What is it?'" in out

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("rto_lightning.evaluation.generation.generate", interrupted)
    status, _, err = run("generate", "model", *how)
    assert status == 130 and "answers so far are kept; the same command goes on" in err and "Traceback" not in err
    path.write_text("[]")
    monkeypatch.setattr("rto_lightning.cli.models.load_policy", lambda options: pytest.fail("it need not be loaded"))
    status, _, err = run("generate", "model", *how)
    assert status == 1 and "exists already" in err
