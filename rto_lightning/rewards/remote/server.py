"""An HTTP reward service; see :mod:`rto_lightning.rewards.remote.protocol` for what it is sent and answers."""

import hmac
import json
import logging
import math
import re
import socket
import sys
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rto_lightning.rewards.remote.protocol import BadRequest, ScoreRequest, read_request

PATH = "/get_reward"
"""Where OpenRLHF's service listens, too."""
PLACES = 64
"""Requests that wait for their turn at a time; more are told to come back."""
IDLE_SECONDS = 10
"""For which a client may send nothing in the middle of a request."""
_LENGTH = re.compile(r"\d{1,15}", re.ASCII)

logger = logging.getLogger(__name__)


class RewardServer(ThreadingHTTPServer):
    """Scores one request after another; each has a thread, which waits for its turn.

    Args:
        address: host and port; port 0 takes a free one.
        score: gives a request one score for each response; raises BadRequest for what it cannot score.
        token: what clients have to send as a bearer token; None lets every client in.
        max_bytes: of a request.
        max_rows: responses in a request.

    Raises:
        OSError: if nothing can listen at the address.
    """

    daemon_threads = False  # so that closing waits for the requests that have come in

    def __init__(
        self,
        address: tuple[str, int],
        score: Callable[[ScoreRequest], list[float]],
        token: str | None = None,
        max_bytes: int = 64 * 2**20,
        max_rows: int = 4096,
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.score, self.token, self.max_bytes, self.max_rows = score, token, max_bytes, max_rows
        self.turn = threading.Lock()
        self.places = threading.BoundedSemaphore(PLACES)
        super().__init__(address, _Handler)

    @property
    def url(self) -> str:
        """Where clients post their requests."""
        host, port = self.server_address[:2]
        return f"http://{f'[{host!s}]' if self.address_family == socket.AF_INET6 else str(host)}:{port}{PATH}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that go away."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    server_version, sys_version = "rto-lightning", ""
    timeout = IDLE_SECONDS
    _unread = 0
    """Bytes of the request's body that are still to come."""

    def do_GET(self) -> None:
        if self.path == "/health":
            self._answer(HTTPStatus.OK, {"status": "ok"})
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        self._unread = int(length) if _LENGTH.fullmatch(length) else 0
        if self.path.partition("?")[0] != PATH:
            self.send_error(HTTPStatus.NOT_FOUND, f"there is nothing but {PATH} and /health")
        elif not self._may_ask():
            self.send_error(HTTPStatus.UNAUTHORIZED, "the bearer token is missing or wrong")
        elif not _LENGTH.fullmatch(length):
            self.send_error(HTTPStatus.LENGTH_REQUIRED)
        elif self._unread > self.server.max_bytes:
            self.send_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {self.server.max_bytes} bytes are taken")
        elif not self.server.places.acquire(blocking=False):
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, "there are too many requests")
        else:
            try:
                self._score()
            finally:
                self.server.places.release()

    def _score(self) -> None:
        body = self.rfile.read(self._unread)
        if len(body) < self._unread:
            raise ConnectionError("the client ended in the middle of its request")
        self._unread = 0
        try:
            request = read_request(body, self.server.max_rows)
            with self.server.turn:
                scores = self.server.score(request)
            if not all(map(math.isfinite, scores)):
                raise BadRequest("a response has a score that is not finite")
        except BadRequest as error:
            self.send_error(HTTPStatus.BAD_REQUEST, str(error))
        except Exception:
            logger.exception("A request could not be scored.")
            self.send_error(
                HTTPStatus.INTERNAL_SERVER_ERROR, "the request could not be scored; the service's log says why"
            )
        else:
            self._answer(HTTPStatus.OK, {"rewards": scores, "scores": scores})

    def _may_ask(self) -> bool:
        if self.server.token is None:
            return True
        given = self.headers.get("Authorization", "")
        return hmac.compare_digest(given.encode(), f"Bearer {self.server.token}".encode())

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """As JSON; what the base class finds wrong too."""
        self._answer(HTTPStatus(code), {"error": message or HTTPStatus(code).phrase})

    def _answer(self, status: HTTPStatus, content: Any) -> None:
        # A client that is still sending would see a broken connection instead; one that sends too much does.
        self._unread = min(self._unread, 2 * self.server.max_bytes)
        while self._unread > 0 and (chunk := self.rfile.read(min(self._unread, 2**16))):
            self._unread -= len(chunk)
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            self.send_header("Retry-After", "1")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Requests are not told one by one."""
