"""A client of HTTP reward services that outlives their outages.

Requests are made concurrently. One that no service can be asked for, or that a service is too busy or broken to answer,
is made again, of another service if there is one, until its patience ends. Scores depend on none of this.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx2

from rto_lightning.errors import UserError
from rto_lightning.rewards.remote.pool import OutOfPatience, Service, ServicePool, Unavailable
from rto_lightning.rewards.remote.protocol import WrongAnswer, read_answer
from rto_lightning.rewards.remote.settings import RewardServiceSettings

LARGEST_ANSWER = 16 * 2**20
"""Bytes of an answer."""

_BUSY = (408, 425, 429)
_NOT_IMPLEMENTED = 501  # the one status from 500 on that waiting does not change
_NAME_TOKEN = "name the environment variable with its token (reward_service.token_variable; evaluate: --key_variable)"
_WAYS_OUT = {
    401: _NAME_TOKEN,
    403: _NAME_TOKEN,
    404: "give its address with the path too, such as /get_reward",
    405: "give its address with the path too, such as /get_reward",
    413: "ask it about fewer responses at a time (reward_service.batch_size)",
}

T = TypeVar("T")


class RewardServiceClient:
    """Asks one service, or several that give the same scores.

    Args:
        urls: where they are.
        settings: how they are asked.
        now: a clock, in seconds.
        sleep: waits for seconds of that clock.

    Raises:
        UserError: if the environment variable with the token is not set.
    """

    def __init__(
        self,
        urls: Sequence[httpx2.URL],
        settings: RewardServiceSettings,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.settings = settings
        self.pool = ServicePool(urls, now, sleep)
        self._token = settings.token()

    def ask(self, requests: Sequence[dict[str, Any]]) -> list[float]:
        """The scores of all requests, in their order.

        Args:
            requests: as :func:`request_content` makes them.

        Raises:
            UserError: if a service refuses a request, sends something else than scores twice, or patience ends.
        """
        return _run(self._ask_all(requests))

    async def _ask_all(self, requests: Sequence[dict[str, Any]]) -> list[float]:
        turn = asyncio.Semaphore(self.settings.concurrency)

        async def ask(http: httpx2.AsyncClient, request: dict[str, Any], rows: range) -> list[float]:
            async with turn:
                return await self._ask(http, json.dumps(request).encode(), rows)

        tasks, row = [], 0
        try:
            async with self._connect() as http, asyncio.TaskGroup() as group:
                for request in requests:
                    rows = range(row, row := row + len(request["query"]))
                    tasks.append(group.create_task(ask(http, request, rows)))
        except ExceptionGroup as failed:  # one request has ended the others
            error = failed.exceptions[0]
            raise error from error.__cause__
        return [score for task in tasks for score in task.result()]

    def _connect(self) -> httpx2.AsyncClient:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        return httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(None, connect=self.settings.connect_timeout),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),  # a service drops idle ones
            trust_env=self.settings.trust_env,
        )

    async def _ask(self, http: httpx2.AsyncClient, content: bytes, rows: range) -> list[float]:
        """The scores of one request, which is about the responses `rows`."""
        pool, about = self.pool, f"responses {rows[0]} to {rows[-1]}"
        deadline, has_erred = pool.now() + self.settings.patience, False
        while True:
            try:
                service = await pool.choose(deadline)
            except OutOfPatience as problems:
                raise UserError(
                    f"{pool.name} gives no scores of {about} ({problems}), for longer than reward_service.patience, "
                    f"{self.settings.patience:g} seconds; start it again, or raise that."
                ) from None
            sent_at = pool.now()
            try:
                scores = read_answer(await self._post(http, service, content), len(rows))
            except Unavailable as failure:
                pool.note_failure(service, sent_at, failure)
            except WrongAnswer as error:
                if has_erred:
                    raise UserError(
                        f"{service.name} {error}, when it was asked again about {about}; it has to send a finite "
                        "number for each."
                    ) from error
                has_erred = True
            else:
                pool.note_answer(service)
                return scores

    async def _post(self, http: httpx2.AsyncClient, service: Service, content: bytes) -> bytes:
        """Send a request; returns the body of the answer."""
        body = bytearray()
        service.waiting += 1
        service.asked += 1
        try:
            async with (
                asyncio.timeout(self.settings.answer_timeout),
                http.stream("POST", service.url, content=content) as response,
            ):
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) > LARGEST_ANSWER:
                        break
        except TimeoutError as error:
            raise Unavailable(f"no answer within {self.settings.answer_timeout:g} seconds") from error
        except httpx2.TransportError as error:
            raise Unavailable(_root(error)) from error
        finally:
            service.waiting -= 1
        self._check_status(service, response, bytes(body[:1000]))
        if len(body) > LARGEST_ANSWER:
            raise WrongAnswer(f"sent more than {LARGEST_ANSWER} bytes")
        return bytes(body)

    def _check_status(self, service: Service, response: httpx2.Response, beginning: bytes) -> None:
        """Raises Unavailable or UserError for what is no success."""
        status = response.status_code
        if response.is_success:
            return
        text = " ".join(beginning.decode("utf-8", errors="replace").split())[:200]
        said = f"{status} {response.reason_phrase}{': ' if text else ''}{text}"
        if self._token is not None:
            said = said.replace(self._token, "***")
        if status in _BUSY or (status >= 500 and status != _NOT_IMPLEMENTED):
            raise Unavailable(said, _seconds(response.headers.get("Retry-After", "")))
        way_out = _WAYS_OUT.get(status, "its log may say why")
        if response.is_redirect:  # not followed: it would turn the request into a GET, and take the token along
            way_out = "give the address that it redirects to"
        raise UserError(f"{service.name} refused a request ({said}); {way_out}.")


def _root(error: BaseException) -> str:
    """What the operating system said, where there is such; "all connection attempts failed" explains nothing."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return str(error) or type(error).__name__


def _seconds(retry_after: str) -> float:
    """What a `Retry-After` header asks for, in seconds or as a date; 0 if it is neither."""
    try:
        return max(0.0, float(int(retry_after)))
    except (ValueError, OverflowError):
        pass
    try:
        date = parsedate_to_datetime(retry_after)
    except ValueError:
        return 0.0
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end in a thread of its own.

    This thread may run an event loop already, as in a notebook, and hears signals, whose exceptions a loop would keep
    to itself; they cancel the coroutine.
    """
    running: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = Future()

    async def main() -> T:
        task = asyncio.current_task()
        assert task is not None
        running.set_result((asyncio.get_running_loop(), task))
        return await coroutine

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(lambda: asyncio.run(main()))
        try:
            return done.result()
        except BaseException:
            loop, task = running.result()
            with suppress(RuntimeError):  # the loop has ended by itself
                loop.call_soon_threadsafe(task.cancel)
            raise
