"""Start and end a vLLM server on this machine."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from rto_lightning.rollout.vllm.colocated import engine_environment, last_words

HOST = "127.0.0.1"
COMMAND = [sys.executable, "-P", str(Path(__file__).with_name("child.py"))]
"""Runs vLLM's server, and ends when this process does. By its path, which imports nothing of ours."""
LOG_TAIL = 65536
"""Bytes of a server's log that are searched for what it said last."""


class ServerProcess:
    """A server on the loopback address, which ends with this object or this process, whichever ends first.

    Args:
        model: hub name or folder.
        arguments: of vLLM's engine, by their Python names.
        port: where it listens; None finds a free one.
        devices: `CUDA_VISIBLE_DEVICES` of the server; None keeps those of this process.
        log: file for all that it writes.
    """

    def __init__(self, model: str, arguments: dict[str, Any], port: int | None, devices: str | None, log: Path) -> None:
        port = port or _free_port()
        self.address = f"http://{HOST}:{port}"
        self.log = log
        words = [*COMMAND, "--model", model, "--host", HOST, "--port", str(port), *flags(arguments)]
        with engine_environment(devices=devices), open(log, "ab") as file:
            # Both let a client change the weights, which is what this server is for.
            os.environ.update(VLLM_SERVER_DEV_MODE="1", VLLM_ALLOW_RUNTIME_LORA_UPDATING="True")
            file.write(f"$ {shlex.join(words)}\n".encode())
            file.flush()
            self.process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._end = weakref.finalize(self, _kill_group, self.process)

    def ended(self) -> bool:
        """Whether it runs no more."""
        return self.process.poll() is not None

    def last_words(self) -> str:
        """What its log ends with."""
        with open(self.log, "rb") as file:
            file.seek(max(0, self.log.stat().st_size - LOG_TAIL))
            return last_words(file.read().decode(errors="replace"))

    def close(self) -> None:
        """End it and all processes that it has started."""
        self._end()


def flags(arguments: dict[str, Any]) -> list[str]:
    """Arguments by their Python names as vLLM's command takes them: `{"max_loras": 1}` is `--max-loras=1`."""
    words = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, dict | list):
            words.append(f"--{flag}={json.dumps(value)}")
        else:
            words.append(f"--{flag}={value}")
    return words


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port: int = listener.getsockname()[1]
        return port


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()
