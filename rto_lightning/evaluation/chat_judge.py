"""A chat model behind an OpenAI-compatible HTTP interface as a judge."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import httpx2
from tqdm import tqdm

from rto_lightning.errors import UserError, check_settings
from rto_lightning.evaluation.answers import Comparison
from rto_lightning.evaluation.judge_prompts import JUDGE_PROMPTS
from rto_lightning.evaluation.judging import Judgment
from rto_lightning.rewards.remote import token_of
from rto_lightning.rewards.remote.settings import shown_url

_BUSY = (408, 409, 425, 429)
_OURS_TO_CURE = (401, 403, 404, 405)
_LONGEST_DELAY = 30.0


@dataclass
class ChatJudgeSettings:
    """Which model judges, and how it is asked."""

    url: str
    """Address of the interface, such as https://api.openai.com/v1; `/chat/completions` is added."""
    model: str
    """Its name there."""
    prompt: Literal["alpaca_eval", "arena_hard"] = "alpaca_eval"
    """The manner of asking."""
    key_variable: str | None = None
    """Name of the environment variable that holds the key; None sends none."""
    concurrency: int = 8
    """Requests that wait for an answer at a time."""
    attempts: int = 3
    """How often a verdict is asked for, if the reply holds none."""
    answer_timeout: float = 300.0
    """Seconds within which a request must be answered."""
    patience: float = 300.0
    """Seconds for which a request is made again while the interface cannot be reached, is busy or broken."""

    def __post_init__(self) -> None:
        """Raise UserError for values that no judge can use."""
        check_settings("judge", self, ("concurrency", "attempts", "answer_timeout"), not_negative=("patience",))


class NoVerdict(Exception):
    """A pair that the judge says nothing of; the message is why."""


class ChatJudge:
    """Asks a chat model about each pair in both orders.

    Args:
        settings: which and how.
        sleep: waits for seconds.
        now: a clock, in seconds.

    Raises:
        UserError: if the address is none, or the key is not there.
    """

    def __init__(
        self,
        settings: ChatJudgeSettings,
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = settings.model
        self.settings = settings
        self.prompt = JUDGE_PROMPTS[settings.prompt]
        self._url = _completions_url(settings.url)
        self._key = None if settings.key_variable is None else token_of(settings.key_variable, "--key_variable")
        self._sleep, self._now = sleep, now
        self._is_lost = False

    def judge(self, comparisons: Sequence[Comparison]) -> list[Judgment]:
        """See :meth:`Judge.judge`.

        Raises:
            UserError: if the interface refuses the key, the address or, for every pair, the request.
        """
        headers = {"Authorization": f"Bearer {self._key}"} if self._key is not None else {}
        timeout = httpx2.Timeout(self.settings.answer_timeout, connect=10.0)
        with (
            httpx2.Client(headers=headers, timeout=timeout) as http,
            ThreadPoolExecutor(self.settings.concurrency) as pool,
            tqdm(total=len(comparisons), desc="judgments", unit="pair", mininterval=1.0) as bar,
        ):
            try:
                tasks = [pool.submit(self._judge, http, comparison) for comparison in comparisons]
                judgments = []
                for task in tasks:
                    judgments.append(task.result())
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if judgments and not any(judgment.games for judgment in judgments):
            raise UserError(f"the judge {self._shown} has judged nothing: {judgments[0].problem}; ask another.")
        return judgments

    def _judge(self, http: httpx2.Client, comparison: Comparison) -> Judgment:
        try:
            first = self._games(http, comparison, model_is_first=True)
            second = self._games(http, comparison, model_is_first=False)
        except NoVerdict as problem:
            return Judgment((), str(problem))
        return Judgment((*first, *(1.0 - game for game in second)))

    def _games(self, http: httpx2.Client, comparison: Comparison, model_is_first: bool) -> tuple[float, ...]:
        """What the answer in the first place won."""
        request: dict[str, Any] = {
            "model": self.settings.model,
            "messages": self.prompt.messages(comparison, model_is_first),
            "max_tokens": self.prompt.max_tokens,
        }
        if self.prompt.logprobs:
            request |= {"logprobs": True, "top_logprobs": 5}
        for attempt in range(self.settings.attempts):
            # At temperature 0 the same nonsense would come again.
            choice = self._post(http, request | {"temperature": 0.0 if attempt == 0 else 1.0})
            if choice is not None and (games := self.prompt.read(choice)) is not None:
                return games
        raise NoVerdict(f"no verdict in {self.settings.attempts} replies")

    def _post(self, http: httpx2.Client, request: dict[str, Any]) -> dict[str, Any] | None:
        """The first choice of a reply; None if there is none in it."""
        deadline, delay = self._now() + (0.0 if self._is_lost else self.settings.patience), 1.0
        while True:
            wait, problem = delay, ""
            try:
                response = http.post(self._url, json=request)
            except httpx2.TransportError as error:
                problem = f"no answer ({str(error) or type(error).__name__})"
            else:
                if response.is_success:
                    self._is_lost = False
                    return _first_choice(response)
                problem = self._refusal(response)
                wait = max(delay, _seconds(response.headers.get("Retry-After", "")))
            if self._now() + wait > deadline:
                self._is_lost = True  # others that wait for it are not made to wait as long
                raise NoVerdict(problem)
            self._sleep(wait)
            delay = min(2 * delay, _LONGEST_DELAY)

    def _refusal(self, response: httpx2.Response) -> str:
        """What an interface said that may say something else later.

        Raises:
            NoVerdict: if it will not, about this request.
            UserError: if it will not, about any.
        """
        status = response.status_code
        text = " ".join(response.text.split())[:200]
        said = f"{status} {response.reason_phrase}{': ' if text else ''}{text}"
        if self._key is not None:
            said = said.replace(self._key, "***")
        if status in _OURS_TO_CURE or response.is_redirect:
            raise UserError(
                f"the judge {self._shown} refuses requests ({said}); correct --judge_url, --judge_model and "
                "--key_variable."
            )
        if status in _BUSY or status >= 500:
            return said
        raise NoVerdict(said)

    @property
    def _shown(self) -> str:
        return f"{self.settings.model} at {shown_url(self._url)}"


def _completions_url(given: str) -> httpx2.URL:
    try:
        url = httpx2.URL(given.rstrip("/") + "/chat/completions")
    except httpx2.InvalidURL:
        url = httpx2.URL()
    if url.scheme not in ("http", "https") or not url.host or url.userinfo:
        raise UserError("--judge_url is no HTTP address without a password; write https://HOST/v1.")
    return url


def _first_choice(response: httpx2.Response) -> dict[str, Any] | None:
    try:
        choice = response.json()["choices"][0]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return None
    return choice if isinstance(choice, dict) else None


def _seconds(retry_after: str) -> float:
    """What a `Retry-After` header asks for, at most a minute; 0 if that is no number."""
    try:
        return min(max(float(retry_after), 0.0), 60.0)
    except ValueError:
        return 0.0
