"""`rto-lightning evaluate`: which of several models answers better, by a judge of one's choice."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rto_lightning.cli.command import add_model_options, make_folder, positive, run_command
from rto_lightning.cli.config_errors import CommandParser
from rto_lightning.errors import UserError

if TYPE_CHECKING:
    from rto_lightning.evaluation.judging import Judge
    from rto_lightning.evaluation.kept_judgments import KeptJudgments
    from rto_lightning.evaluation.win_rates import ModelResult

ANNOTATIONS, WIN_RATES = "annotations.json", "win_rates.json"

_JUDGES = ("reward", "reward_function", "reward_url", "judge_url")


def main(args: Sequence[str]) -> None:
    """Runs `rto-lightning evaluate` with these arguments.

    Raises:
        UserError: for every mistake that the user can cure; BenchmarkError if answers do not fit together.
    """
    run_command(args, _parse, _evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    from rto_lightning.evaluation.annotations import read_annotations
    from rto_lightning.evaluation.length_control import check_length_control, length_controlled
    from rto_lightning.evaluation.table import results_table

    if options.length_controlled:
        check_length_control()
    if options.output is not None:
        make_folder(options.output)
    kept = None
    if options.annotations:
        results = [result for path in options.annotations for result in read_annotations(path)]
    else:
        results, kept = _compare(options)
    try:
        # Judgments may have been dear, and what follows can fail.
        if options.output is not None:
            _write(options.output, results)
        if kept is not None:
            kept.remove()
        if options.length_controlled:
            results = [length_controlled(result) for result in results]
            if options.output is not None:
                _write(options.output, results)
    finally:
        print(results_table(results))
    if options.output is not None:
        print(f"written: {options.output}")


def _compare(options: argparse.Namespace) -> "tuple[list[ModelResult], KeptJudgments | None]":
    """The results of all models, and the judgments of a chat model as they were kept on the way."""
    from rto_lightning.evaluation.answers import match_answers, read_answers
    from rto_lightning.evaluation.length_control import check_instructions
    from rto_lightning.evaluation.questions import read_questions
    from rto_lightning.evaluation.win_rates import model_result

    questions = None if options.questions is None else read_questions(options.questions)
    baseline = read_answers(options.baseline)
    models = match_answers(baseline, [read_answers(path) for path in options.answers], questions)
    if options.length_controlled:
        for model, comparisons in models.items():
            check_instructions(model, len(comparisons))
    judge, kept = _chat_judge(options) if options.judge_url is not None else (_score_judge(options), None)
    results = [
        model_result(model, baseline.model, judge.name, comparisons, judge.judge(comparisons))
        for model, comparisons in models.items()
    ]
    return results, kept


def _chat_judge(options: argparse.Namespace) -> "tuple[Judge, KeptJudgments]":
    from rto_lightning.evaluation.chat_judge import ChatJudge, ChatJudgeSettings
    from rto_lightning.evaluation.kept_judgments import KeptJudgments

    settings = ChatJudgeSettings(
        options.judge_url,
        options.judge_model,
        options.judge_prompt,
        options.key_variable,
        options.concurrency,
        options.attempts,
    )
    kept = KeptJudgments(options.output / ANNOTATIONS, settings.identity)
    return ChatJudge(settings, kept), kept


def _score_judge(options: argparse.Namespace) -> "Judge":

    from rto_lightning.backbone.loading import load_chat_tokenizer_from
    from rto_lightning.backbone.settings import DTYPES
    from rto_lightning.cli.models import load_reward_role, move
    from rto_lightning.evaluation import scorers
    from rto_lightning.evaluation.judging import ScoreJudge
    from rto_lightning.rewards import OutsideRewardModel, RewardServiceSettings
    from rto_lightning.rewards.remote import token_of
    from rto_lightning.saved.models import is_whole_model

    if options.reward_function is not None:
        return ScoreJudge(options.reward_function, scorers.function_scorer(options.reward_function))
    if options.reward_url is not None:
        if options.key_variable is not None:
            token_of(options.key_variable, "--key_variable")
        service = RewardServiceSettings(concurrency=options.concurrency, token_variable=options.key_variable)
        scorer = scorers.service_scorer([options.reward_url], options.tokenizer, service)
        return ScoreJudge(options.reward_url, scorer)
    if not is_whole_model(options.reward):
        return ScoreJudge(options.reward, scorers.role_scorer(load_reward_role(options.reward, options)))
    chat = load_chat_tokenizer_from(options.reward)
    outside = OutsideRewardModel(options.reward, chat, DTYPES["float32"])
    move(outside, options.device)
    return ScoreJudge(options.reward, scorers.outside_scorer(outside, options.batch_size))


def _write(folder: Path, results: "Sequence[ModelResult]") -> None:
    from rto_lightning.evaluation.annotations import write_annotations
    from rto_lightning.evaluation.figure import save_figure
    from rto_lightning.runs.files import written_whole

    write_annotations(folder / ANNOTATIONS, results)
    save_figure(folder / "win_rates.png", results)
    # Last, since a folder that has it is complete.
    with written_whole(folder / WIN_RATES, "w", encoding="utf-8") as file:
        json.dump([result.summary() for result in results], file, ensure_ascii=False, indent=2)


def _parse(args: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(
        prog="rto-lightning evaluate",
        description="Compare the answers of models with those of a baseline: win rates with 95% intervals, over all "
        "prompts and by category, and lengths.",
    )
    parser.add_argument(
        "answers", nargs="*", metavar="FILE", help="answers of one model each: AlpacaEval's, Arena-Hard's or of predict"
    )
    parser.add_argument("--baseline", metavar="FILE", help="answers that they are compared with")
    parser.add_argument(
        "--questions", metavar="SOURCE", help="what was asked (needed for Arena-Hard v0.1), and categories"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="gets win_rates.json, .png and annotations.json")
    parser.add_argument(
        "--length_controlled",
        action="store_true",
        help="of AlpacaEval 2's 805 instructions in their order also the length-controlled win rate, by alpaca_eval",
    )
    judges = parser.add_argument_group("who judges (one of these)")
    judges.add_argument("--reward", metavar="FROM", help="reward role of a run, or outside reward model")
    judges.add_argument("--reward_function", metavar="MODULE:FUNCTION", help="gives prompts and answers scores")
    judges.add_argument("--reward_url", metavar="URL", help="HTTP reward service; needs --tokenizer")
    judges.add_argument(
        "--judge_url", metavar="URL", help="OpenAI-compatible interface; needs --judge_model and --output"
    )
    judges.add_argument("--annotations", nargs="+", metavar="FILE", help="judged before: AlpacaEval's annotations.json")
    details = parser.add_argument_group("how it judges")
    details.add_argument("--tokenizer", metavar="NAME", help="model whose chat template a reward service understands")
    details.add_argument("--judge_model", metavar="NAME", help="name of the judge at --judge_url")
    details.add_argument(
        "--judge_prompt", choices=("alpaca_eval", "arena_hard"), default="alpaca_eval", help="(alpaca_eval)"
    )
    details.add_argument("--key_variable", metavar="NAME", help="environment variable with the key of an interface")
    details.add_argument("--concurrency", type=positive, default=8, help="requests at a time (8)")
    details.add_argument("--attempts", type=positive, default=3, help="how often a judge is asked for a verdict (3)")
    add_model_options(details, "answers for each forward")
    options = parser.parse_args(args)
    _check(parser, options)
    return options


def _check(parser: CommandParser, options: argparse.Namespace) -> None:
    judges = [name for name in (*_JUDGES, "annotations") if getattr(options, name) is not None]
    if len(judges) != 1:
        listed = ", ".join(f"--{name}" for name in (*_JUDGES, "annotations"))
        parser.error(f"give one judge of {listed}" + (f", not {len(judges)}" if judges else ""))
    answered = bool(options.answers) and options.baseline is not None
    if options.annotations and (options.answers or options.baseline or options.questions):
        parser.error("--annotations holds answers already; leave out the files, --baseline and --questions")
    if not options.annotations and not answered:
        parser.error("give the answers of one model or several, and those of --baseline")
    for name, needed in (("reward_url", "tokenizer"), ("judge_url", "judge_model")):
        if getattr(options, name) is not None and getattr(options, needed) is None:
            parser.error(f"--{name} needs --{needed}")
    if options.reward_url is not None and not options.reward_url.startswith(("http://", "https://")):
        parser.error("--reward_url is no HTTP address; write http://HOST:PORT/PATH")
    if options.judge_url is not None and options.output is None:
        parser.error("--judge_url needs --output, where the judgments are kept as they come")
    if options.output is not None and (options.output / WIN_RATES).exists():
        raise UserError(f"{options.output} holds win rates already; choose another --output.")
