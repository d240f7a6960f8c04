"""A reward service on loopback that fails as it is told to, a clock that waits in no time, and responses to score."""

import asyncio
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from rto_lightning.backbone import ChatTokenizer, Message, Sequences
from rto_lightning.rewards import RemoteReward, RewardServiceSettings
from rto_lightning.rollout import Trajectory

REPOSITORY = Path(__file__).resolve().parents[2]

Fault = Callable[["FaultyHandler"], None]


class FaultyServer(ThreadingHTTPServer):
    """Scores a response by its length, once the faults that it was given are used up, one a request."""

    daemon_threads = True

    def __init__(self, *faults: Fault, port: int = 0, fault: Fault | None = None) -> None:
        super().__init__(("127.0.0.1", port), FaultyHandler)
        self.faults = list(faults)
        self.fault = fault
        """What every request meets when `faults` are used up."""
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/get_reward"


class FaultyHandler(BaseHTTPRequestHandler):
    server: FaultyServer

    def do_POST(self) -> None:
        self.content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(self.content)
            self.server.headers.append(dict(self.headers))
            fault = self.server.faults.pop(0) if self.server.faults else self.server.fault
        if fault is not None:
            fault(self)
        else:
            self.answer(json.dumps({"rewards": self.scores}))

    @property
    def scores(self) -> list[float]:
        return [float(len(response)) for response in self.content["responses"]]

    def answer(self, body: str | bytes, status: int = 200, length: int | None = None, **headers: str) -> None:
        sent = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        self.send_header("Content-Length", str(len(sent) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(sent)

    def reset(self) -> None:
        """End the connection by a reset, in the place of an orderly end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, *args: Any) -> None:
        """Stay silent."""


@contextmanager
def running(server: Any) -> Iterator[Any]:
    """A server that answers within this context."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def serving(*args: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`rto-lightning serve-reward` in a process of its own, and the address that it names."""
    command = [sys.executable, "-m", "rto_lightning", "serve-reward", *args, "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        yield process, line[line.index("http://") :].split()[0]
    finally:
        process.kill()
        process.wait()


class Clock:
    """Passes when something waits by it, and never else."""

    def __init__(self) -> None:
        self.time = 0.0
        self.events: list[tuple[float, Callable[[], None]]] = []
        """What happens at which time."""

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        until = self.time + seconds
        await asyncio.sleep(0)
        self.time = max(self.time, until)
        for at, happen in list(self.events):
            if at <= self.time:
                self.events.remove((at, happen))
                happen()


def free_port() -> int:
    """A port at which nothing listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def say(body: str | bytes, status: int = 200, length: int | None = None, **headers: str) -> Fault:
    """Answers with this."""
    return lambda handler: handler.answer(body, status, length, **headers)


def late(seconds: float) -> Fault:
    """Answers rightly, after some time."""

    def fault(handler: FaultyHandler) -> None:
        time.sleep(seconds)
        handler.answer(json.dumps({"rewards": handler.scores}))

    return fault


def responses(chat: ChatTokenizer, texts: list[str]) -> tuple[list[list[Message]], Trajectory]:
    """Prompts of different lengths with these responses; those that begin with "cut" have no stop token."""
    prompts: list[list[Message]] = [[{"role": "user", "content": "Hi" * (n % 3)}] for n in range(len(texts))]
    rows = [chat.encode_response(text, 200) for text in texts]
    truncated = [text.startswith("cut") for text in texts]
    rows = [row[:-1] if is_truncated else row for row, is_truncated in zip(rows, truncated, strict=True)]
    sequences = Sequences.from_lists(chat.encode_prompts(prompts), rows, chat.pad_id)
    return prompts, Trajectory(sequences, torch.tensor(truncated))


def remote(
    chat: ChatTokenizer, *servers: FaultyServer | str, clock: Clock | None = None, **settings: Any
) -> RemoteReward:
    """The source of scores that asks these servers, by a clock that waits in no time."""
    clock = clock or Clock()
    urls = [server if isinstance(server, str) else server.url for server in servers]
    return RemoteReward(urls, RewardServiceSettings(**settings), chat, clock.now, clock.sleep)
