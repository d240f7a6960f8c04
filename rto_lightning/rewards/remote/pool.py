"""Which of several reward services to ask, and for how long to wait for one."""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from math import inf

import httpx2

from rto_lightning.parallel import rank
from rto_lightning.rewards.remote.settings import shown_url

FIRST_DELAY, LONGEST_DELAY = 1.0, 30.0
"""Seconds for which a service is left alone after its first failure in a row, and after many; they double between."""
NEWS_INTERVAL = 30.0
"""Seconds between two lines of the log about failures of the same service."""

logger = logging.getLogger(__name__)


class Unavailable(Exception):
    """A service that may answer later.

    Args:
        reason: what it said, or what failed.
        retry_after: seconds for which it asks to be left alone.
    """

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class OutOfPatience(Exception):
    """No service will be ready before a request's deadline; the message is what each has failed with."""


@dataclass(eq=False)
class Service:
    """One address, and what is known of it."""

    url: httpx2.URL
    waiting: int = 0
    """Requests that it has still to answer."""
    asked: int = 0
    """Requests that it was ever sent."""
    failures: int = 0
    """In a row."""
    problem: str = ""
    """What it has failed with last."""
    silent_since: float = 0.0
    """When it failed first, of those in a row."""
    ready_at: float = -inf
    """When it is asked again."""
    told_at: float = -inf
    """When the log last spoke of a failure."""

    @property
    def name(self) -> str:
        """For messages."""
        return f"the reward service {shown_url(self.url)}"


class ServicePool:
    """Services that give the same scores.

    Args:
        urls: where they are.
        now: a clock, in seconds.
        sleep: waits for seconds of that clock.
    """

    def __init__(
        self,
        urls: Sequence[httpx2.URL],
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.services = [Service(url) for url in urls]
        self.name = "the reward service " + ", ".join(shown_url(url) for url in urls)
        self.now, self._sleep = now, sleep
        # Delays differ between ranks, which else would all come back at once; nothing else is drawn from this.
        self._random = random.Random(rank())

    async def choose(self, deadline: float) -> Service:
        """The service that has the fewest requests to answer, of those that have not just failed; waits for one.

        Args:
            deadline: of the request, on the clock.

        Raises:
            OutOfPatience: if none is to be asked again before the deadline.
        """
        while True:
            now = self.now()
            ready = [service for service in self.services if service.ready_at <= now]
            if ready:
                return min(ready, key=lambda service: (service.waiting, service.asked))
            next_try = min(service.ready_at for service in self.services)
            if next_try > deadline:
                raise OutOfPatience("; ".join(dict.fromkeys(service.problem for service in self.services)))
            await self._sleep(next_try - now)

    def note_failure(self, service: Service, sent_at: float, failure: Unavailable) -> None:
        """Leave a service alone for a while that has failed with a request sent at this time."""
        now = self.now()
        if service.failures == 0:
            service.silent_since = now
        if sent_at >= service.ready_at:  # else another request, made at the same time, has counted
            service.failures += 1
            delay = min(FIRST_DELAY * 2 ** min(service.failures - 1, 10), LONGEST_DELAY)
            service.ready_at = now + delay * self._random.uniform(0.5, 1.0)
        service.ready_at = max(service.ready_at, now + failure.retry_after)
        service.problem = str(failure)
        if now >= service.told_at + NEWS_INTERVAL:
            service.told_at = now
            silence = f" for {now - service.silent_since:.0f} seconds" if service.failures > 1 else ""
            logger.warning("%s gives no scores%s (%s); it is asked again.", service.name, silence, failure)

    def note_answer(self, service: Service) -> None:
        """Ask a service on that has answered."""
        if service.failures > 0 and service.told_at >= service.silent_since:
            seconds = self.now() - service.silent_since
            logger.warning("%s gives scores again, after %.0f seconds.", service.name, seconds)
        service.failures, service.ready_at = 0, -inf
