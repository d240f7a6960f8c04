"""A small HTTP server with the requests of vLLM that a rollout uses. It needs nothing but the standard library."""

import json
import shutil
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeServer(ThreadingHTTPServer):
    """Answers a prompt with its own ids in reverse order and the seed, and remembers what it was asked."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.requests: list[tuple[str, Any]] = []
        self.status = 200
        self.kept_weights: str | None = None
        """Where a folder of weights is copied to when it is announced."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        models = {"data": [{"id": "base", "max_model_len": 64}]}
        self.answer({"/health": {}, "/v1/models": models}[self.path])

    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
        self.server.requests.append((self.path, content))
        if self.path == "/collective_rpc" and self.server.kept_weights is not None:
            shutil.copytree(content["kwargs"]["weights_path"], self.server.kept_weights, dirs_exist_ok=True)
        if self.path != "/v1/completions":
            self.answer({})
            return
        tokens = [*reversed(content["prompt"]), content["seed"]]
        logprobs = {"token_logprobs": [-float(token) for token in tokens]}
        self.answer({"choices": [{"token_ids": tokens, "logprobs": logprobs}]})

    def answer(self, content: Any) -> None:
        body = json.dumps(content if self.server.status == 200 else {"error": "CUDA error: out of memory"}).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Stay silent."""


def main() -> None:
    """Stands for vLLM's server: `--model MODEL --port N`."""
    if sys.argv[sys.argv.index("--model") + 1] == "broken":
        print("loading weights\nValueError: Head size 7 is not supported.\nbye", flush=True)
        sys.exit(1)
    FakeServer(int(sys.argv[sys.argv.index("--port") + 1])).serve_forever()
