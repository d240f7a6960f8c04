"""Answers of a model to the questions of a benchmark.

Questions are answered in fixed batches, each answer with a seed of its own, so that a generation that was ended and
goes on gives the bytes of one that ran through.
"""

import hashlib
import time
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rto_lightning.backbone import PolicyBackbone
from rto_lightning.data.batches import PromptBatch
from rto_lightning.data.prompts import PromptRow, collate_prompts
from rto_lightning.errors import UserError, check_settings
from rto_lightning.evaluation.answer_rows import GeneratedAnswer, answer_file, answer_file_text
from rto_lightning.evaluation.progress_file import ProgressFile
from rto_lightning.evaluation.questions import Format, Question, Questions, refuse_ids
from rto_lightning.rollout import RolloutEngine, RolloutSettings, Trajectory, build_engine, response_texts, sample_seeds
from rto_lightning.runs.files import written_whole

DEFAULT_TEMPERATURE = {"alpaca_eval": 0.7, "arena_hard_v0.1": 0.0, "arena_hard_v2.0": 0.0}
"""Of the answers to each benchmark: sampled for AlpacaEval 2, greedy for Arena-Hard."""
DEFAULT_MAX_NEW_TOKENS = 4096

_ITERATION = -3  # of the seeds; training counts up from 0, and validation has -1 and -2
_WEIGHTS_READ = 1024


@dataclass(frozen=True)
class GenerationSettings:
    """How a model answers."""

    name: str
    """Of the model, in the answer file."""
    output: Path
    """Folder in which the file goes to where the benchmark looks for it."""
    temperature: float | None = None
    """Divides the logits, 0 is greedy; None takes that of the benchmark."""
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    """Length limit of an answer in tokens, the stop id included."""
    batch_size: int = 16
    """Answers that are sampled at a time."""
    seed: int = 0
    """Each answer is drawn by a seed that follows from this and its position."""

    def __post_init__(self) -> None:
        """Raise UserError for values that no generation can use."""
        check_settings("generate", self, ("max_new_tokens", "batch_size"), not_negative=("temperature",))


@dataclass(frozen=True)
class Generation:
    """What a generation has written."""

    path: Path
    """The answer file."""
    answers: list[GeneratedAnswer]
    """One to each question."""
    resumed: int
    """Answers that an earlier process had generated."""


def new_answer_file(settings: GenerationSettings, kind: Format) -> Path:
    """Where the answers go.

    Raises:
        UserError: if the file exists, or no file can be named like the model.
    """
    path = answer_file(settings.output, kind, settings.name)
    if path.exists():
        raise UserError(f"{path} exists already; remove it or choose another --output.")
    return path


def generate(
    backbone: PolicyBackbone,
    role: str,
    questions: Questions,
    settings: GenerationSettings,
    rollout: RolloutSettings | None = None,
    now: float | None = None,
) -> Generation:
    """Answers all questions and writes the file that the benchmark reads.

    Args:
        backbone: the model, where it is to compute.
        role: who answers.
        questions: of one benchmark.
        settings: how.
        rollout: which engine samples; its length, temperature and batch size are those of `settings`.
        now: seconds since 1970; None takes the clock.

    Raises:
        UserError: if the file exists, the model's context is too short, or an unfinished generation differs.
    """
    path = new_answer_file(settings, questions.format)
    temperature = DEFAULT_TEMPERATURE[questions.format] if settings.temperature is None else settings.temperature
    rollout = replace(
        rollout or RolloutSettings(),
        max_new_tokens=settings.max_new_tokens,
        temperature=temperature,
        batch_size=settings.batch_size,
    )
    rollout.check_engine(training=False)
    rows = _encode(backbone, role, questions.rows, settings.max_new_tokens)
    follows_from = {
        "name": settings.name,
        "questions": questions.fingerprint,
        "model": _weights_fingerprint(backbone, role),
        "prompts": hashlib.sha256(repr([row.prompt.tolist() for row in rows]).encode()).hexdigest()[:16],
        "dtype": backbone.settings.dtype,
        "engine": rollout.engine,
        "temperature": temperature,
        "max_new_tokens": settings.max_new_tokens,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
    }
    progress = ProgressFile(path, follows_from, time.time() if now is None else now, _batch_as_json, _batch_of_json)
    resumed = sum(map(len, progress.parts))
    _answer_all(build_engine(backbone, rollout), backbone, role, rows, settings, progress)
    answers = [answer for batch in progress.parts for answer in batch]
    with written_whole(path, "w", encoding="utf-8") as file:
        file.write(answer_file_text(questions.format, settings.name, questions.rows, answers, progress.started))
    progress.remove()
    return Generation(path, answers, resumed)


def _answer_all(
    engine: RolloutEngine,
    backbone: PolicyBackbone,
    role: str,
    rows: Sequence[PromptRow],
    settings: GenerationSettings,
    progress: ProgressFile[list[GeneratedAnswer]],
) -> None:
    """Generate the batches that are missing."""
    size = settings.batch_size
    device = next(backbone.parameters()).device
    done = sum(map(len, progress.parts))
    try:
        with tqdm(total=len(rows), initial=done, desc="answers", unit="answer", mininterval=1.0) as bar:
            for start in range(done, len(rows), size):
                batch = collate_prompts(rows[start : start + size], backbone.chat.pad_id)
                progress.add(_answer(engine, backbone, role, batch.to(device), settings.seed))
                bar.update(len(batch))
    finally:
        engine.close()


@torch.no_grad()
def _answer(
    engine: RolloutEngine, backbone: PolicyBackbone, role: str, batch: PromptBatch, seed: int
) -> list[GeneratedAnswer]:
    seeds = sample_seeds(seed, _ITERATION, batch.index)
    trajectory: Trajectory = engine.rollout(role, batch.input_ids, batch.attention_mask, seeds)
    lengths = trajectory.sequences.response_lengths - (~trajectory.truncated).long()
    texts = response_texts(trajectory, backbone.chat)
    return [
        GeneratedAnswer(text, tokens, truncated)
        for text, tokens, truncated in zip(texts, lengths.tolist(), trajectory.truncated.tolist(), strict=True)
    ]


def _batch_as_json(answers: list[GeneratedAnswer]) -> list[dict[str, Any]]:
    return [asdict(answer) for answer in answers]


def _batch_of_json(rows: Any) -> list[GeneratedAnswer]:
    return [GeneratedAnswer(**row) for row in rows]


def _encode(backbone: PolicyBackbone, role: str, questions: Sequence[Question], max_new_tokens: int) -> list[PromptRow]:
    """The questions as tokens.

    Raises:
        BenchmarkError: if some leave no place for an answer in the model's context.
        UserError: if the longest one and its answer have none there.
    """
    ids = backbone.chat.encode_prompts([question.messages for question in questions])
    longest = max(map(len, ids))
    context = backbone.context_length(role)
    too_long = (question.id for question, row in zip(questions, ids, strict=True) if len(row) >= context)
    refuse_ids(too_long, "the questions", f"have as many tokens as the model takes, {context}", "leave them out")
    if longest + max_new_tokens > context:
        raise UserError(
            f"the longest question has {longest} tokens, and an answer may have {max_new_tokens}, but the model takes "
            f"{context} together; set --max_new_tokens to {context - longest} or less."
        )
    return [
        PromptRow(number, array("i", row), question.messages)
        for number, (row, question) in enumerate(zip(ids, questions, strict=True))
    ]


def _weights_fingerprint(backbone: PolicyBackbone, role: str) -> str:
    """Changes when a role is trained further: of each of its weights the first ones are read."""
    digest = hashlib.sha256()
    for name, weight in backbone.model_of(role).named_parameters():
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(_bytes(weight.detach().flatten()[:_WEIGHTS_READ]))
    return digest.hexdigest()[:16]


def _bytes(values: Tensor) -> bytes:
    raw: bytes = values.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return raw
