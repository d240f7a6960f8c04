"""`rto-lightning serve-reward`: a trained reward role as an HTTP service."""

import argparse
import ipaddress
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rto_lightning.cli.command import add_model_options, positive, run_command
from rto_lightning.cli.config_errors import CommandParser
from rto_lightning.errors import UserError

if TYPE_CHECKING:
    from rto_lightning.rewards.remote import RewardServer


def main(args: Sequence[str]) -> None:
    """Runs `rto-lightning serve-reward` with these arguments, until SIGTERM or SIGINT (Ctrl-C) ends it.

    Raises:
        UserError: for every mistake that the user can cure.
    """
    run_command(args, _parse, _load_and_serve)


def _load_and_serve(options: argparse.Namespace) -> None:
    from rto_lightning.cli.models import load_reward_role
    from rto_lightning.rewards.remote import RewardServer, token_of

    token = None if options.token_variable is None else token_of(options.token_variable, "--token_variable")
    role = load_reward_role(options.source, options)
    try:
        server = RewardServer((options.host, options.port), role, token, options.max_mib * 2**20, options.max_rows)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {options.host}, port {options.port} ({error}); choose others.") from error
    lines = [f"{options.source}: its scores are at {server.url} (Ctrl-C ends it)"]
    if not _is_loopback(options.host):
        who = "whoever has the token" if token is not None else "everyone"
        lines.append(f"open to the network: {who} who reaches this address may ask; nothing is encrypted")
    _serve(server, lines)


def _serve(server: "RewardServer", lines: Sequence[str]) -> None:
    """Answers requests until a signal comes, and the last ones to their end."""
    ended = threading.Event()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: ended.set()) for number in numbers}
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1})
    thread.start()
    try:
        print("\n".join(lines), flush=True)
        ended.wait()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _parse(args: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(
        prog="rto-lightning serve-reward",
        description="Score responses over HTTP (POST /get_reward, GET /health) as model.reward_url asks for it, and as "
        "OpenRLHF's remote reward models do.",
    )
    parser.add_argument(
        "source",
        metavar="FROM",
        type=Path,
        help="folder of a stage (its role/, or else its last checkpoint), the folder of a reward role, or a checkpoint",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (127.0.0.1, which no other machine reaches)"
    )
    parser.add_argument("--port", type=int, default=5000, help="port to listen on (5000); 0 finds a free one")
    parser.add_argument(
        "--token_variable", metavar="NAME", help="environment variable with the token that clients send"
    )
    parser.add_argument("--no_token", action="store_true", help="let every client of a network in")
    add_model_options(parser, "responses for each forward")
    parser.add_argument("--max_rows", type=positive, default=4096, help="responses in a request (4096)")
    parser.add_argument("--max_mib", type=positive, default=64, help="size of a request in MiB (64)")
    options = parser.parse_args(args)
    if not _is_loopback(options.host) and options.token_variable is None and not options.no_token:
        parser.error(
            f"--host {options.host} opens the service to the network; name the environment variable with its token by "
            "--token_variable, or let everyone in by --no_token"
        )
    return options
