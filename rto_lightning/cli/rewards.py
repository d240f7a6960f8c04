"""`rto-lightning rewards`: the reward that a DPO role gives to every token of given responses."""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from rto_lightning.cli.command import add_device_option, positive, run_command
from rto_lightning.cli.config_errors import CommandParser
from rto_lightning.errors import UserError

if TYPE_CHECKING:
    from rto_lightning.data.formats import Preference
    from rto_lightning.inspection import Answer, RewardedPair, RewardedResponse, TokenRewardReader
    from rto_lightning.inspection.summary import RewardSummary

_SUFFIXES = (".html", ".jsonl", ".parquet")
_BATCHES_AT_ONCE = 16
"""Batches whose responses are sorted by length before they are read."""


def main(args: Sequence[str]) -> None:
    """Runs `rto-lightning rewards` with these arguments.

    Raises:
        UserError: for every mistake that the user can cure.
    """
    run_command(args, _parse, _rewards)


def _rewards(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from rto_lightning.inspection import reward_examples
    from rto_lightning.inspection.files import RewardFile, reward_rows
    from rto_lightning.inspection.summary import RewardSummary

    count, examples = _examples(options)
    reader = _open(options)
    summary, shown = RewardSummary(), list["RewardedResponse | RewardedPair"]()
    with ExitStack() as opened:
        files = [opened.enter_context(RewardFile(path)) for path in options.output if path.suffix != ".html"]
        # On a terminal it would stand among the rows.
        is_hidden = count < 2 or (not options.output and sys.stdout.isatty())
        bar = opened.enter_context(tqdm(total=count, desc="rewards", unit="row", mininterval=1.0, disable=is_hidden))
        for part in reward_examples(reader, examples, _BATCHES_AT_ONCE * options.batch_size):
            rows = [row for index, item in part for row in reward_rows(index, item)]
            for file in files:
                file.write(rows)
            if not options.output:
                sys.stdout.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            items = [item for _, item in part]
            summary.add(items)
            shown += items[: options.shown - len(shown)]
            bar.update(part[-1][0] + 1 - bar.n)  # with the rows that are left out
        bar.update(count - bar.n)
        if summary.items == 0:
            raise UserError(f"{options.data} has no row that can be used; check its columns and texts.")
    if options.output:
        _write_pages(options, shown, summary)
        print("\n".join(f"{name}: {value}" for name, value in summary.facts().items()))
        print("written: " + ", ".join(map(str, options.output)))


def _examples(options: argparse.Namespace) -> "tuple[int, Iterator[tuple[int, Preference | Answer]]]":
    """How many rows there are, and what is to be read, each with the number of its row, from 0."""
    from rto_lightning.data.formats import Preference
    from rto_lightning.data.sources import load_table
    from rto_lightning.inspection import Answer, load_examples

    if options.data is not None:
        count = sum(1 for _ in load_table(options.data, options.max_rows).rows)
        return count, load_examples(options.data, options.max_rows, options.bad_rows)
    prompt = [{"role": "user", "content": options.prompt}]
    if options.response is None:
        return 1, iter([(0, Preference(prompt, options.chosen, options.rejected))])
    response = sys.stdin.read() if options.response == "-" else options.response
    if not response.strip():
        raise UserError("there is no response on standard input; pipe one into the command.")
    return 1, iter([(0, Answer(prompt, response))])


def _open(options: argparse.Namespace) -> "TokenRewardReader":
    from rto_lightning.cli.models import move
    from rto_lightning.inspection import TokenRewardReader, open_dpo_role, open_scores

    backbone = open_dpo_role(options.dpo, options.base_model, options.reference, options.dtype)
    move(backbone, options.device)
    scores = None if options.reward is None else open_scores(backbone, options.reward)
    limits = {"batch_size": options.batch_size, "max_response_tokens": options.max_response_tokens}
    return TokenRewardReader(backbone, scores, beta_1=options.beta_1, clip=options.clip, **limits)


def _write_pages(
    options: argparse.Namespace, shown: "Sequence[RewardedResponse | RewardedPair]", summary: "RewardSummary"
) -> None:
    from rto_lightning.inspection import TokenRewardPage

    given = {"DPO role": options.dpo, "reference": options.reference, "reward model": options.reward}
    facts = {name: value for name, value in given.items() if value is not None} | summary.facts()
    if len(shown) < summary.items:
        facts["shown here"] = f"the first {len(shown)} of {summary.items:,} rows"
    unit = "nats" if options.beta_1 == 1 else ""
    for path in options.output:
        if path.suffix == ".html":
            TokenRewardPage(shown, facts=facts, unit=unit).save(path)


def _parse(args: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(
        prog="rto-lightning rewards",
        description="Show which tokens a DPO role likes: the reward beta_1 * log(dpo / reference) of every token of "
        "given responses, as a page (.html) or as rows (.jsonl, .parquet; without --output JSONL on standard output).",
    )
    parser.add_argument(
        "--dpo", required=True, metavar="ROLE", help="folder of a DPO stage or its role, or a model trained by DPO"
    )
    source = parser.add_argument_group("what is rewarded: --data, or a --prompt with one response or a pair")
    source.add_argument(
        "--data",
        metavar="SOURCE",
        help="file, folder or data set with `prompt` and `response` (as predict writes it), `instruction` and `output` "
        "(as generate does for AlpacaEval), or `chosen` and `rejected`",
    )
    source.add_argument("--prompt", metavar="TEXT", help="a question of the user")
    source.add_argument("--response", metavar="TEXT", help="the answer to it; - reads it from standard input")
    source.add_argument("--chosen", metavar="TEXT", help="the preferred answer of a pair")
    source.add_argument("--rejected", metavar="TEXT", help="the other answer of it")
    source.add_argument("--max_rows", type=positive, metavar="N", help="only the first N rows of --data")
    source.add_argument("--bad_rows", choices=("error", "skip"), default="error", help="what to do with them (error)")
    source.add_argument(
        "--max_response_tokens", type=positive, metavar="N", default=2048, help="answers are cut to N tokens (2048)"
    )
    output = parser.add_argument_group("what is written")
    output.add_argument("--output", nargs="+", type=Path, default=[], metavar="FILE", help=".html, .jsonl or .parquet")
    output.add_argument("--shown", type=positive, metavar="N", default=50, help="most rows on a page (50)")
    output.add_argument("--beta_1", type=float, default=1.0, help="scale of the rewards (1, which leaves them in nats)")
    output.add_argument("--clip", type=float, default=0.0, help="largest magnitude after scaling (0, none)")
    models = parser.add_argument_group("models")
    models.add_argument(
        "--reward", metavar="ROLE", help="reward role or outside reward model whose score of a response is shown"
    )
    models.add_argument("--base_model", metavar="NAME", help="what the DPO role was trained from, if it is elsewhere")
    models.add_argument("--reference", metavar="ROLE", help="SFT adapter or model that it was trained against")
    models.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (float32)")
    add_device_option(models)
    models.add_argument("--batch_size", type=positive, metavar="N", default=8, help="responses of a forward (8)")
    options = parser.parse_args(args)
    _check(parser, options)
    return options


def _check(parser: CommandParser, options: argparse.Namespace) -> None:
    texts = {name for name in ("prompt", "response", "chosen", "rejected") if getattr(options, name) is not None}
    if options.data is None and texts not in ({"prompt", "response"}, {"prompt", "chosen", "rejected"}):
        parser.error("give --data, or --prompt with --response, or --prompt with --chosen and --rejected")
    if options.data is not None and texts:
        parser.error(f"--{min(texts)} does not go with --data; leave one out")
    for name in texts:
        if not getattr(options, name).strip():
            parser.error(f"--{name} is empty")
        if not _is_text(getattr(options, name)):
            parser.error(f"--{name} is not UTF-8 text")
    if not 0 <= options.clip < math.inf:
        parser.error(f"--clip {options.clip:g} is negative or no number; 0 switches clipping off")
    if not math.isfinite(options.beta_1):
        parser.error(f"--beta_1 {options.beta_1:g} is no number")
    twice = {path for path in options.output if options.output.count(path) > 1}
    if twice:
        parser.error(f"--output names {min(twice)} more than once")
    for path in options.output:
        if path.suffix not in _SUFFIXES:
            parser.error(f"--output {path} does not end with {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}")
        if path.exists():
            raise UserError(f"{path} exists already; remove it or choose another --output.")
        if not path.parent.is_dir():
            raise UserError(f"the folder of {path} does not exist; make it or choose another --output.")


def _is_text(argument: str) -> bool:
    try:
        argument.encode()
    except UnicodeEncodeError:  # bytes of the shell that are no text
        return False
    return True
