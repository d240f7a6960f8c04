"""A chat model behind an OpenAI-compatible HTTP interface as a judge."""

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Literal

import httpx2
from tqdm import tqdm

from rto_lightning.errors import UserError, check_settings
from rto_lightning.evaluation.answers import Comparison
from rto_lightning.evaluation.judge_prompts import JUDGE_PROMPTS
from rto_lightning.evaluation.judging import Judgment
from rto_lightning.evaluation.kept_judgments import KeptJudgments
from rto_lightning.rewards.remote import token_of
from rto_lightning.rewards.remote.settings import shown_url

_BUSY = (408, 409, 425, 429)
_OURS_TO_CURE = (401, 402, 403, 404, 405)
_LONGEST_DELAY = 30.0
_HOPELESS = 16
"""Pairs of which a judge that can judge at all judges one; after so many the others are not paid for."""


@dataclass(frozen=True)
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

    @property
    def identity(self) -> dict[str, str]:
        """What judgments follow from, beside the pairs.

        Raises:
            UserError: if the address is none.
        """
        prompt = JUDGE_PROMPTS[self.prompt]
        words = hashlib.sha256(repr((prompt.system, prompt.max_tokens)).encode()).hexdigest()[:16]
        url = shown_url(_completions_url(self.url))
        return {"judge_model": self.model, "judge_url": url, "judge_prompt": f"{self.prompt} {words}"}


class NoVerdict(Exception):
    """A pair that the judge says nothing of; the message is why."""


class ChatJudge:
    """Asks a chat model about each pair in both orders.

    Args:
        settings: which and how.
        kept: takes judgments as they come, and has those of an earlier process; None keeps none.
        sleep: waits for seconds; None waits, and no longer than the judging lasts.
        now: a clock, in seconds.

    Raises:
        UserError: if the address is none, or the key is not there.
    """

    def __init__(
        self,
        settings: ChatJudgeSettings,
        kept: KeptJudgments | None = None,
        sleep: Callable[[float], object] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = settings.model
        self.settings = settings
        self.prompt = JUDGE_PROMPTS[settings.prompt]
        self._url = _completions_url(settings.url)
        self._key = None if settings.key_variable is None else token_of(settings.key_variable, "--key_variable")
        self._kept, self._now = kept, now
        self._ended = threading.Event()
        self._sleep = sleep or self._ended.wait

    def judge(self, comparisons: Sequence[Comparison]) -> list[Judgment]:
        """See :meth:`Judge.judge`.

        Raises:
            UserError: if the interface refuses the key, the address or the request, cannot be reached, or says nothing
                that is a verdict. What it has judged until then is kept.
        """
        headers = {"Authorization": f"Bearer {self._key}"} if self._key is not None else {}
        timeout = httpx2.Timeout(self.settings.answer_timeout, connect=10.0)
        before = [None if self._kept is None else self._kept.get(comparison) for comparison in comparisons]
        judgments = {number: judgment for number, judgment in enumerate(before) if judgment is not None}
        with (
            httpx2.Client(headers=headers, timeout=timeout) as http,
            ThreadPoolExecutor(self.settings.concurrency) as pool,
            tqdm(total=len(comparisons), initial=len(judgments), desc="judgments", unit="pair", mininterval=1.0) as bar,
        ):
            asked = (number for number in range(len(comparisons)) if number not in judgments)
            tasks = {pool.submit(self._judge, http, comparisons[number]): number for number in asked}
            try:
                for task in as_completed(tasks):
                    judgments[tasks[task]] = task.result()
                    bar.update()
                    self._check_hope(judgments, is_last=len(judgments) == len(comparisons))
            except BaseException:
                self._ended.set()  # what is under way comes to its end, and is kept
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [judgments[number] for number in range(len(comparisons))]

    def _check_hope(self, judgments: dict[int, Judgment], is_last: bool) -> None:
        """Raise UserError if the first judgments, or all, say nothing."""
        if (is_last or len(judgments) == _HOPELESS) and not any(judgment.games for judgment in judgments.values()):
            problem = next(iter(judgments.values())).problem
            raise UserError(f"the judge {self._shown} has judged nothing of {len(judgments)}: {problem}; ask another.")

    def _judge(self, http: httpx2.Client, comparison: Comparison) -> Judgment:
        try:
            first = self._games(http, comparison, model_is_first=True)
            second = self._games(http, comparison, model_is_first=False)
        except NoVerdict as problem:
            return Judgment((), str(problem))
        except UserError:
            self._ended.set()  # at once, so that no other thread pays for more
            raise
        judgment = Judgment((*first, *(1.0 - game for game in second)))
        if self._kept is not None:
            self._kept.add(comparison, judgment)
        return judgment

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
        deadline, delay = self._now() + self.settings.patience, 1.0
        while not self._ended.is_set():
            wait, problem = delay, ""
            try:
                response = http.post(self._url, json=request)
            except httpx2.TransportError as error:
                problem = f"no answer ({str(error) or type(error).__name__})"
            else:
                if response.is_success:
                    return _first_choice(response)
                problem = self._refusal(response)
                wait = max(delay, _seconds(response.headers.get("Retry-After", "")))
            if self._now() + wait > deadline:
                # Not unjudged: which pairs an interface has no answer to says nothing of the answers compared.
                raise UserError(f"the judge {self._shown} cannot be asked: {problem}; {self._way_out}.")
            self._sleep(wait)
            delay = min(2 * delay, _LONGEST_DELAY)
        raise NoVerdict("the judging has ended")

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
                f"the judge {self._shown} refuses requests ({said}); correct --judge_url, --judge_model or "
                f"--key_variable, or the account behind it; {self._way_out}."
            )
        if status in _BUSY or status >= 500:
            return said
        raise NoVerdict(said)

    @property
    def _way_out(self) -> str:
        if self._kept is None:
            return "ask again later"
        return f"its judgments so far are kept in {self._kept.path}, and the same command goes on with the others"

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
