"""Scores by an HTTP reward service."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

import torch
from torch import Tensor

from rto_lightning.backbone import ChatTokenizer, Message
from rto_lightning.rewards.remote.client import RewardServiceClient
from rto_lightning.rewards.remote.protocol import request_content
from rto_lightning.rewards.remote.settings import RewardServiceSettings, service_urls
from rto_lightning.rollout import Trajectory


class RemoteReward:
    """An HTTP service; see :mod:`rto_lightning.rewards.remote.protocol` for what it is sent and has to answer.

    Args:
        urls: its address, or several of services that give the same scores, over which requests are spread.
        settings: how they are asked.
        chat: turns tokens into text.
        now: a clock, in seconds.
        sleep: waits for seconds of that clock.

    Raises:
        UserError: if an address is none, or the token is not there.
    """

    takes_all = True

    def __init__(
        self,
        urls: str | Sequence[str],
        settings: RewardServiceSettings,
        chat: ChatTokenizer,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.chat = chat
        self.settings = settings
        self.client = RewardServiceClient(service_urls(urls), settings, now, sleep)
        self.name = self.client.pool.name

    def score(self, prompts: list[list[Message]], trajectory: Trajectory) -> Tensor:
        """See :meth:`RewardSource.score`."""
        size = self.settings.batch_size
        batches = [slice(start, start + size) for start in range(0, len(prompts), size)]
        requests = [request_content(prompts[batch], trajectory.rows(batch), self.chat) for batch in batches]
        return torch.tensor(self.client.ask(requests), dtype=torch.float32, device=trajectory.truncated.device)
