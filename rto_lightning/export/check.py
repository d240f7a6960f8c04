"""Whether an export computes what the role computes.

Both read the same few conversations in float32. Where weights were not rounded they must agree to float32 rounding.
Where they were, the role with its own weights rounded likewise must agree with the export to float32 rounding; how far
both are from the role as it was is what rounding costs, and is reported.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from rto_lightning.backbone import BackboneSettings, ChatTokenizer, Sequences
from rto_lightning.backbone.decoding import evaluating
from rto_lightning.backbone.loading import context_length, load_pretrained, load_tokenizer
from rto_lightning.errors import UserError
from rto_lightning.export.merge import load_plain
from rto_lightning.saved.opening import OpenedRole

TOLERANCE = 1e-4
"""Largest difference that float32 rounding explains, in units of a logit."""
RELATIVE_TOLERANCE = 2e-5
"""The same as a share of the largest logit, which counts above 5. Of SmolLM2-135M, whose logits reach 38, two matrix
libraries alone make 3e-6 of it."""
_LONGEST_RESPONSE = 16
_CONVERSATIONS = (
    ("What is the capital of France?", "Paris."),
    ("Write one line about the sea.", "Grey water, and a gull that complains."),
    ("17 + 25 = ?", "42"),
    ("Bitte antworte auf Deutsch: Wie geht es dir?", "Danke, gut."),
)


@dataclass(frozen=True)
class Agreement:
    """How an export and its source compare."""

    what: str
    """`logits` or `scores`."""
    largest_difference: float
    """Between the export and the source in float32."""
    unexplained: float
    """Between the export and the source whose weights are rounded as the export's; the same if none are."""
    same_token: float | None
    """Share of positions at which both find the same next token likeliest; None for scores."""
    positions: int
    """How many were compared."""

    def __str__(self) -> str:
        """One sentence."""
        text = f"largest difference of {self.what} {self.largest_difference:.1e}"
        if self.unexplained != self.largest_difference:
            text += f", of which rounding the weights explains all but {self.unexplained:.1e}"
        if self.same_token is not None:
            text += f"; the same likeliest token at {100 * self.same_token:.1f}% of {self.positions} positions"
        return text


def check_sequences(chat: ChatTokenizer, config: Any) -> Sequences:
    """The conversations that are compared, no longer than a model takes."""
    longest = context_length(config)
    prompts = [chat.encode_prompt([{"role": "user", "content": question}]) for question, _ in _CONVERSATIONS]
    responses = [chat.encode_response(answer, _LONGEST_RESPONSE) for _, answer in _CONVERSATIONS]
    return Sequences.from_lists([row[-(longest - _LONGEST_RESPONSE) :] for row in prompts], responses, chat.pad_id)


@torch.no_grad()
def source_values(role: OpenedRole, sequences: Sequences, scores: bool) -> Tensor:
    """What the role says: logits (N, V) of all N tokens, or scores (B,), in float32."""
    with role.backbone.play(role.name) as model, evaluating(model):
        if scores:
            return role.backbone.sequence_scores(role.name, sequences).float()
        return model_values(model, sequences, scores=False)


@torch.no_grad()
def model_values(model: PreTrainedModel, sequences: Sequences, scores: bool) -> Tensor:
    """What a model says, one row at a time and without padding; as :func:`source_values`."""
    rows = [model(input_ids=torch.tensor([ids]), use_cache=False).logits.float() for ids in _rows(sequences)]
    return torch.cat([row.flatten() if scores else row[0] for row in rows])


@torch.no_grad()
def exported_values(folder: Path, sequences: Sequences, settings: BackboneSettings, kind: str) -> Tensor:
    """What a written folder says through transformers and PEFT alone; as :func:`source_values`.

    Args:
        folder: the export.
        sequences: what is read; a classifier reads it in one padded batch.
        settings: name the base model of an adapter.
        kind: `adapter`, `model` or `classifier`.
    """
    if kind == "adapter":
        adapter: Any = PeftModel.from_pretrained(load_plain(settings, torch.float32), str(folder))
        return model_values(adapter.eval(), sequences, scores=False)
    loader = AutoModelForCausalLM if kind == "model" else AutoModelForSequenceClassification
    trust = settings.trust_remote_code
    model = load_pretrained(loader, str(folder), trust_remote_code=trust, dtype=torch.float32).eval()
    if kind == "model" or model.config.pad_token_id is None:
        return model_values(model, sequences, scores=kind == "classifier")
    batch = load_tokenizer(str(folder), None, trust).pad({"input_ids": _rows(sequences)}, return_tensors="pt")
    values: Tensor = model(**batch).logits.flatten().float()
    return values


def require_equal(values: Tensor, expected: Tensor, what: str) -> float:
    """The largest difference, which must be one of float32 rounding.

    Raises:
        UserError: if it is larger.
    """
    difference = float((values - expected).abs().max())
    tolerance = max(TOLERANCE, RELATIVE_TOLERANCE * float(expected.abs().max()))
    if not difference <= tolerance:  # also if it is no number
        raise UserError(
            f"{what} differs from the trained role by {difference:.1e}, more than rounding explains, and is not "
            "written; --no_check would do so all the same."
        )
    return difference


def compare(values: Tensor, source: Tensor, rounded: Tensor, scores: bool) -> Agreement:
    """Compare an export with its source.

    Args:
        values: of the export.
        source: of the role in float32.
        rounded: of the role whose weights are rounded as the export's.
        scores: whether they are scores (B,) and not logits (N, V).

    Raises:
        UserError: if they differ by more than rounding explains.
    """
    unexplained = require_equal(values, rounded, "the export")
    same = None if scores else float((values.argmax(-1) == source.argmax(-1)).float().mean())
    largest = float((values - source).abs().max())
    return Agreement("scores" if scores else "logits", largest, unexplained, same, len(values))


def _rows(sequences: Sequences) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(sequences.input_ids, sequences.attention_mask, strict=True)]
