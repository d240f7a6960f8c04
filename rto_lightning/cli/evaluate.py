"""`rto-lightning evaluate`: which of several models answers better, by a judge of one's choice."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rto_lightning.cli.config_errors import CommandParser, ConfigurationError
from rto_lightning.errors import UserError

if TYPE_CHECKING:
    from rto_lightning.evaluation.judging import Judge
    from rto_lightning.evaluation.win_rates import ModelResult

_JUDGES = ("reward", "reward_function", "reward_url", "judge_url")


def main(args: Sequence[str]) -> None:
    """Runs `rto-lightning evaluate` with these arguments.

    Raises:
        ConfigurationError: if answers do not fit together, with the ids of those at fault.
        UserError: for every other mistake that the user can cure.
    """
    options = _parse(args)
    from rto_lightning.cli.quiet import quiet_libraries, quiet_lightning

    quiet_libraries()
    quiet_lightning()
    from rto_lightning.evaluation.annotations import read_annotations
    from rto_lightning.evaluation.length_control import length_controlled
    from rto_lightning.evaluation.questions import BenchmarkError
    from rto_lightning.evaluation.table import results_table

    try:
        if options.annotations:
            results = [result for path in options.annotations for result in read_annotations(path)]
        else:
            results = _compare(options)
    except BenchmarkError as error:
        raise ConfigurationError(str(error)) from error
    # Judgments may have been dear, and what follows can fail.
    if options.output is not None:
        _write(options.output, results)
    if options.length_controlled:
        results = [length_controlled(result) for result in results]
        if options.output is not None:
            _write(options.output, results)
    print(results_table(results))
    if options.output is not None:
        print(f"written: {options.output}")


def _compare(options: argparse.Namespace) -> "list[ModelResult]":
    from rto_lightning.evaluation.answers import match_answers, read_answers
    from rto_lightning.evaluation.questions import read_questions
    from rto_lightning.evaluation.win_rates import model_result

    questions = None if options.questions is None else read_questions(options.questions)
    baseline = read_answers(options.baseline)
    models = match_answers(baseline, [read_answers(path) for path in options.answers], questions)
    judge = _judge(options)
    return [
        model_result(model, baseline.model, judge.name, comparisons, judge.judge(comparisons))
        for model, comparisons in models.items()
    ]


def _judge(options: argparse.Namespace) -> "Judge":
    from rto_lightning.cli.export import load_stage_module
    from rto_lightning.evaluation.chat_judge import ChatJudge, ChatJudgeSettings
    from rto_lightning.evaluation.judging import ScoreJudge
    from rto_lightning.evaluation.scorers import function_scorer, reward_scorer, service_scorer
    from rto_lightning.rewards import RewardServiceSettings

    if options.judge_url is not None:
        settings = ChatJudgeSettings(
            options.judge_url,
            options.judge_model,
            options.judge_prompt,
            options.key_variable,
            options.concurrency,
            options.attempts,
        )
        return ChatJudge(settings)
    if options.reward_function is not None:
        return ScoreJudge(options.reward_function, function_scorer(options.reward_function))
    if options.reward_url is not None:
        service = RewardServiceSettings(concurrency=options.concurrency, token_variable=options.key_variable)
        return ScoreJudge(options.reward_url, service_scorer([options.reward_url], options.tokenizer, service))
    scorer = reward_scorer(
        options.reward, load_stage_module, options.dtype, options.base_model, options.device, options.batch_size
    )
    return ScoreJudge(options.reward, scorer)


def _write(folder: Path, results: "Sequence[ModelResult]") -> None:
    from rto_lightning.evaluation.annotations import write_annotations
    from rto_lightning.evaluation.figure import save_figure
    from rto_lightning.runs.files import written_whole

    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / "win_rates.json", "w", encoding="utf-8") as file:
        json.dump([result.summary() for result in results], file, ensure_ascii=False, indent=2)
    write_annotations(folder / "annotations.json", results)
    save_figure(folder / "win_rates.png", results)


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
    judges.add_argument("--judge_url", metavar="URL", help="OpenAI-compatible interface; needs --judge_model")
    judges.add_argument("--annotations", nargs="+", metavar="FILE", help="judged before: AlpacaEval's annotations.json")
    details = parser.add_argument_group("how it judges")
    details.add_argument("--tokenizer", metavar="NAME", help="model whose chat template a reward service understands")
    details.add_argument("--judge_model", metavar="NAME", help="name of the judge at --judge_url")
    details.add_argument(
        "--judge_prompt", choices=("alpaca_eval", "arena_hard"), default="alpaca_eval", help="(alpaca_eval)"
    )
    details.add_argument("--key_variable", metavar="NAME", help="environment variable with the key of an interface")
    details.add_argument("--concurrency", type=_positive, default=8, help="requests at a time (8)")
    details.add_argument("--attempts", type=_positive, default=3, help="how often a judge is asked for a verdict (3)")
    details.add_argument("--batch_size", type=_positive, default=16, help="answers for each forward (16)")
    details.add_argument("--device", help="such as cpu or cuda:1 (cuda if there is one)")
    details.add_argument(
        "--dtype", choices=("float32", "auto"), default="float32", help="of frozen weights (float32); auto is as stored"
    )
    details.add_argument("--base_model", metavar="NAME", help="base model of an adapter, if it is elsewhere by now")
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
    if options.output is not None and (options.output / "win_rates.json").exists():
        raise UserError(f"{options.output} holds win rates already; choose another --output.")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number
