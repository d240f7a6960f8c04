"""`rto-lightning serve-reward`: a trained reward role as an HTTP service."""

import argparse
import ipaddress
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rto_lightning.cli.config_errors import CommandParser
from rto_lightning.errors import UserError

if TYPE_CHECKING:
    from rto_lightning.rewards.remote import RewardServer, ServedRole


def main(args: Sequence[str]) -> None:
    """Runs `rto-lightning serve-reward` with these arguments, until SIGTERM or SIGINT (Ctrl-C) ends it.

    Raises:
        UserError: for every mistake that the user can cure.
    """
    options = _parse(args)
    from rto_lightning.cli.quiet import quiet_libraries, quiet_lightning

    quiet_libraries()
    quiet_lightning()
    from rto_lightning.rewards.remote import RewardServer, token_of

    token = None if options.token_variable is None else token_of(options.token_variable, "--token_variable")
    role = _load(options)
    try:
        server = RewardServer((options.host, options.port), role, token, options.max_mib * 2**20, options.max_rows)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {options.host}, port {options.port} ({error}); choose others.") from error
    lines = [f"{options.source}: its scores are at {server.url} (Ctrl-C ends it)"]
    if not _is_loopback(options.host):
        who = "whoever has the token" if token is not None else "everyone"
        lines.append(f"open to the network: {who} who reaches this address may ask; nothing is encrypted")
    _serve(server, lines)


def _load(options: argparse.Namespace) -> "ServedRole":
    import torch

    from rto_lightning.cli.export import load_stage_module
    from rto_lightning.export.opening import open_role
    from rto_lightning.export.source import find_source
    from rto_lightning.rewards.remote import ServedRole

    source = find_source(options.source, "reward")
    opened = open_role(source, options.dtype == "float32", options.base_model, load_stage_module)
    if opened.head is None:
        raise UserError(f"{options.source} has no scalar head; name a saved reward role.")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        opened.backbone.to(device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UserError(f"the device {device} cannot be used: {str(error).splitlines()[0]}") from error
    return ServedRole(opened.backbone, opened.name, options.batch_size)


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
    parser.add_argument("--device", help="such as cpu or cuda:1 (cuda if there is one)")
    parser.add_argument(
        "--dtype", choices=("float32", "auto"), default="float32", help="of frozen weights (float32); auto is as stored"
    )
    parser.add_argument("--base_model", metavar="NAME", help="base model of an adapter, if it is elsewhere by now")
    parser.add_argument("--batch_size", type=_positive, default=16, help="responses for each forward (16)")
    parser.add_argument("--max_rows", type=_positive, default=4096, help="responses in a request (4096)")
    parser.add_argument("--max_mib", type=_positive, default=64, help="size of a request in MiB (64)")
    options = parser.parse_args(args)
    if not _is_loopback(options.host) and options.token_variable is None and not options.no_token:
        parser.error(
            f"--host {options.host} opens the service to the network; name the environment variable with its token by "
            "--token_variable, or let everyone in by --no_token"
        )
    return options


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number
