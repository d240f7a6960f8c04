"""vLLM beside the model that is trained: an engine process of its own, on the device of the training process.

vLLM starts it as a child, so that a crash leaves the training process alone.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

import torch

from rto_lightning.backbone import PolicyBackbone
from rto_lightning.errors import UserError
from rto_lightning.parallel import rank
from rto_lightning.rollout.settings import RolloutSettings
from rto_lightning.rollout.vllm.client import EngineStopped, Sample, engine_arguments, sampling_arguments

T = TypeVar("T")

POLL_SECONDS = 0.5
"""Between two looks at whether an engine that does not answer is still there."""
TOLD_CHARACTERS = 400
OF_THE_LAUNCHER = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_",
    "MASTER_",
    "TORCHELASTIC_",
)
"""Beginnings of variables by which torchrun's processes find each other; an engine would take them for its own."""


class ColocatedClient:
    """An engine for this training process alone.

    Args:
        backbone: the model and its roles.
        settings: of the rollout.
    """

    max_model_len: int

    def __init__(self, backbone: PolicyBackbone, settings: RolloutSettings) -> None:
        self.backbone = backbone
        self.settings = settings
        self._llm: Any = None
        self._processes: list[BaseProcess] = []
        self._adapters: dict[str, Any] = {}
        self._last_id = 0

    @property
    def place(self) -> str:
        """Another one on every rank."""
        return f"rank {rank()}"

    def start(self) -> str:
        """As :meth:`Client.start`."""
        arguments = engine_arguments(self.backbone, self.settings)
        with engine_environment(_device_index()):
            others = active_children()
            try:
                import vllm  # late: it changes settings of the process, and is not always installed

                self._llm = vllm.LLM(self.backbone.settings.model, **arguments)
            except (TypeError, ValueError, RuntimeError, OSError, ImportError) as error:
                raise UserError(
                    f"vLLM did not start: {last_words(str(error))}; what it wrote above tells more, and "
                    "model.rollout.vllm is where to change it."
                ) from error
        self._processes = [process for process in active_children() if process not in others]
        self.max_model_len = self._llm.model_config.max_model_len
        return self.place

    def connect(self, address: str) -> None:
        """Never asked for: each rank starts its own."""

    def add_adapter(self, name: str, folder: Path) -> None:
        """As :meth:`Client.add_adapter`."""
        from vllm.lora.request import LoRARequest

        self._last_id += 1
        self._adapters[name] = LoRARequest(name, self._last_id, str(folder))

    def remove_adapter(self, name: str) -> None:
        """As :meth:`Client.remove_adapter`."""
        number = self._adapters.pop(name).lora_int_id
        self._ask(lambda: self._llm.llm_engine.remove_lora(number))

    def load_weights(self, folder: Path) -> None:
        """As :meth:`Client.load_weights`."""
        self._ask(lambda: self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)}))
        self._ask(self._llm.reset_prefix_cache)

    def sample(self, prompts: Sequence[list[int]], seeds: Sequence[int], adapter: str | None) -> list[Sample]:
        """As :meth:`Client.sample`."""
        from vllm import SamplingParams

        shared = sampling_arguments(self.backbone.chat.stop_ids, self.settings)
        outputs = self._ask(
            lambda: self._llm.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts],
                [SamplingParams(**shared, seed=seed, detokenize=False) for seed in seeds],
                use_tqdm=False,
                lora_request=self._adapters[adapter] if adapter is not None else None,
            )
        )
        answers = [output.outputs[0] for output in outputs]
        return [
            Sample(
                list(answer.token_ids),
                [step[token].logprob for token, step in zip(answer.token_ids, answer.logprobs, strict=True)],
            )
            for answer in answers
        ]

    def close(self) -> None:
        """As :meth:`Client.close`."""
        llm, self._llm = self._llm, None
        self._adapters, self._processes = {}, []
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()

    def _ask(self, question: Callable[[], T]) -> T:
        """What the engine answers; raises EngineStopped if it died."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return answer_of(question, self._processes)
        except EngineDeadError as error:
            raise EngineStopped(last_words(str(error))) from error


def answer_of(question: Callable[[], T], processes: Sequence[BaseProcess]) -> T:
    """The result of a function that waits for other processes, unless one of these ends.

    It runs in a thread of its own, since vLLM waits for ever for an engine that was killed, as the kernel does when
    memory runs out.

    Raises:
        EngineStopped: if a process has ended and no result came.
    """
    answers: SimpleQueue[tuple[T, None] | tuple[None, BaseException]] = SimpleQueue()

    def run() -> None:
        try:
            answers.put((question(), None))
        except BaseException as error:
            answers.put((None, error))

    Thread(target=run, daemon=True).start()
    ended: list[BaseProcess] = []
    while True:
        try:
            answer, error = answers.get(timeout=POLL_SECONDS)
        except Empty:
            if ended:  # for as long as vLLM might have needed to tell it itself
                codes = ", ".join(f"{process.name} (exit code {process.exitcode})" for process in ended)
                raise EngineStopped(f"nothing; these processes ended: {codes}") from None
            ended = [process for process in processes if not process.is_alive()]
            continue
        if error is not None:
            raise error
        return answer  # type: ignore[return-value]


@contextmanager
def engine_environment(device: int | None = None, devices: str | None = None) -> Iterator[None]:
    """Within it, a process that is started knows its devices, and nothing of the processes that train.

    Args:
        device: number of the only one, among those that this process sees; None is all of them.
        devices: in its place, `CUDA_VISIBLE_DEVICES` as it shall be.
    """
    before = dict(os.environ)
    for name in before:
        if name.startswith(OF_THE_LAUNCHER):
            del os.environ[name]
    # A fork would share the threads and locks of this process.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    elif device is not None:
        visible = [name for name in before.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[device] if visible else str(device)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def last_words(text: str) -> str:
    """What was written from the last line on that names an error, else the last line, without a closing full stop."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()] or ["nothing"]
    telling = [number for number, line in enumerate(lines) if "Error" in line or "error:" in line]
    return " ".join(lines[telling[-1] if telling else -1 :])[:TOLD_CHARACTERS].rstrip(".")


def _device_index() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_available() else None
