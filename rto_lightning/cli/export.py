"""`rto-lightning export`: a trained role as a folder that PEFT, transformers and vLLM load."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rto_lightning.cli.command import run_command
from rto_lightning.cli.config_errors import CommandParser
from rto_lightning.export import DTYPES, ROLES, ExportSettings

_SIZE = re.compile(r"\d+(\.\d+)?(KB|MB|GB|TB)")
_KINDS = {
    "adapter": "a PEFT adapter",
    "model": "a causal language model",
    "classifier": "a sequence classifier with one label",
}


def main(args: Sequence[str]) -> None:
    """Runs `rto-lightning export` with these arguments.

    Raises:
        UserError: for every mistake that the user can cure.
    """
    run_command(args, _parse, _export)


def _export(settings: ExportSettings) -> None:
    from rto_lightning.cli.opening import load_stage_module
    from rto_lightning.export.export import export_role

    exported = export_role(settings, partial(load_stage_module, trusted=settings.trust_remote_code))
    print(f"{settings.target}: the {exported.role} as {_KINDS[exported.kind]}, {exported.dtype}")
    print(f"check: {exported.agreement}" if exported.agreement is not None else "not compared with the trained role")
    if exported.missing_bias:
        print(f"scores are lower than the role's by {exported.missing_bias:.6g}: the class has no place for the bias")
    if settings.push_to_hub is not None:
        print(f"uploaded to {settings.push_to_hub}")


def _parse(args: Sequence[str]) -> ExportSettings:
    parser = CommandParser(prog="rto-lightning export", description="Write a trained role for use elsewhere.")
    parser.add_argument(
        "source",
        metavar="FROM",
        type=Path,
        help="folder of a stage (its role/, or else its last checkpoint), a role folder, or a checkpoint",
    )
    parser.add_argument("target", metavar="TO", type=Path, help="folder to write, which must not exist or be empty")
    parser.add_argument("--role", choices=ROLES, help="a role of the stage that is not the one it trains")
    parser.add_argument(
        "--merge",
        action="store_true",
        help="add the adapter to its base model; a reward role becomes a sequence classifier with one label",
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="data type of a whole model (bfloat16)")
    parser.add_argument("--base_model", metavar="NAME", help="base model of an adapter, if it is elsewhere by now")
    parser.add_argument("--max_shard_size", metavar="SIZE", default="5GB", help="largest file (5GB)")
    parser.add_argument("--no_check", action="store_true", help="do not compare with the role, which takes memory")
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run code that the base model brings along or config.yaml names; leave it off unless you have read it",
    )
    parser.add_argument("--push_to_hub", metavar="USER/NAME", help="upload the folder to the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="make a new repository there private")
    options = vars(parser.parse_args(args))
    if not _SIZE.fullmatch(options["max_shard_size"]):
        parser.error(f"--max_shard_size {options['max_shard_size']} is no size such as 5GB or 500MB")
    if options["private"] and options["push_to_hub"] is None:
        parser.error("--private is for --push_to_hub")
    return ExportSettings(check=not options.pop("no_check"), **options)
