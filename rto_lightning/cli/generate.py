"""`rto-lightning generate`: the answers of a model to the questions of AlpacaEval 2 or Arena-Hard."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rto_lightning.cli.command import add_model_options, make_folder, positive, run_command
from rto_lightning.cli.config_errors import CommandParser

if TYPE_CHECKING:
    from rto_lightning.rollout import RolloutSettings


def main(args: Sequence[str]) -> None:
    """Runs `rto-lightning generate` with these arguments.

    Raises:
        UserError: for every mistake that the user can cure.
    """
    run_command(args, _parse, _generate)


def _generate(options: argparse.Namespace) -> None:
    from rto_lightning.cli.models import load_policy
    from rto_lightning.evaluation.generation import GenerationSettings, generate, new_answer_file
    from rto_lightning.evaluation.questions import listed, read_questions

    settings = GenerationSettings(
        options.name, options.output, options.temperature, options.max_new_tokens, options.batch_size, options.seed
    )
    rollout = _rollout(options)
    try:
        questions = read_questions(options.questions, options.max_rows)
        make_folder(new_answer_file(settings, questions.format).parent)
        generation = generate(*load_policy(options), questions, settings, rollout)
    except KeyboardInterrupt:
        print("answers so far are kept; the same command goes on with the others", file=sys.stderr)
        raise
    before = f", {generation.resumed} of them from before" if generation.resumed else ""
    print(f"{generation.path}: {len(generation.answers)} answers of {options.name}{before}")
    truncated = sum(answer.truncated for answer in generation.answers)
    pairs = zip(questions.rows, generation.answers, strict=True)
    empty = [question.id for question, answer in pairs if not answer.text.strip()]
    if truncated:
        print(f"{truncated} answers were cut off at {options.max_new_tokens} tokens")
    if empty:
        print(f"{len(empty)} answers are empty, which evaluate refuses: to {listed(empty)}")


def _rollout(options: argparse.Namespace) -> "RolloutSettings":
    from rto_lightning.rollout import RolloutSettings, VLLMSettings

    if options.engine == "transformers":
        return RolloutSettings()
    # No training needs a part of the device's memory.
    share = 0.45 if options.gpu_memory_utilization is None else options.gpu_memory_utilization
    return RolloutSettings(engine="vllm", vllm=VLLMSettings(gpu_memory_utilization=share))


def _parse(args: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(
        prog="rto-lightning generate",
        description="Answer the questions of AlpacaEval 2 or Arena-Hard, and write the file that these read. A command "
        "that was ended goes on where it was, with the same answers as if it had run through.",
    )
    parser.add_argument(
        "source",
        metavar="FROM",
        help="folder of a stage (its role/, or else its last checkpoint), a role folder, a checkpoint, or the folder "
        "or hub name of a whole model",
    )
    parser.add_argument(
        "--questions",
        required=True,
        metavar="SOURCE",
        help="file or data set: AlpacaEval's (`instruction`), Arena-Hard's question.jsonl (v0.1 or v2.0), or prompts",
    )
    parser.add_argument("--name", required=True, help="of the model, in the file")
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="FOLDER",
        help="gets model_outputs.json (AlpacaEval) or model_answer/NAME.jsonl (Arena-Hard)",
    )
    parser.add_argument("--temperature", type=float, help="0 is greedy (0.7 for AlpacaEval, 0 for Arena-Hard)")
    parser.add_argument("--max_new_tokens", type=positive, default=4096, help="length limit of an answer (4096)")
    parser.add_argument("--max_rows", type=positive, metavar="N", help="only the first N questions")
    parser.add_argument("--seed", type=int, default=0, help="of the sampled answers (0)")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers", help="(transformers)")
    parser.add_argument("--gpu_memory_utilization", type=float, help="share of the device's memory for vLLM (0.45)")
    add_model_options(parser, "answers at a time")
    return parser.parse_args(args)
