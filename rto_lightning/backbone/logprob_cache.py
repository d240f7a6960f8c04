"""Log-probabilities of given responses under a role that does not change, computed once and kept on disk.

A file's name is a hash of all that its numbers follow from: the weights that the role computes with, how they are held
and run, and the token ids. So a file is never read for another model, other data or other settings; what changes one of
them makes a new file, and old ones can be deleted. A file that is damaged is computed again.
"""

import hashlib
import inspect
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from rto_lightning.backbone.policy_backbone import PolicyBackbone
from rto_lightning.backbone.role_bank import BASE
from rto_lightning.backbone.sequences import Sequences
from rto_lightning.errors import UserError

FORMAT = 1
"""Raise it when what the same settings compute changes."""
SECONDS_BETWEEN_LINES = 10.0
"""How often progress is written where it cannot be redrawn in place (a file, a pipe)."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResponseLogprobs:
    """The log-probability of each token of N responses, one response after the other without padding."""

    values: Tensor
    """(S,) float32 (float64 if the weights are), in nats, on the CPU; S is the number of tokens of all responses."""
    offsets: Tensor
    """(N + 1,) int64: response i is `values[offsets[i] : offsets[i + 1]]`."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def response(self, row: int) -> Tensor:
        """The log-probabilities of one response, (length,)."""
        return self.values[int(self.offsets[row]) : int(self.offsets[row + 1])]

    def padded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Some responses in one rectangle.

        Args:
            rows: (B,) int64, which responses.

        Returns:
            Log-probabilities (B, T), 0 outside the response, and the mask (B, T) bool; T is the longest of them.
        """
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        columns = torch.arange(int(lengths.max()) if len(rows) else 0)
        mask = columns < lengths[:, None]
        logprobs = self.values.new_zeros(mask.shape)
        logprobs[mask] = self.values[(starts[:, None] + columns)[mask]]
        return logprobs, mask


def cached_logprobs(
    backbone: PolicyBackbone,
    role: str,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    folder: Path | str,
    batch_size: int = 16,
    progress: bool = True,
    weights: str | None = None,
) -> ResponseLogprobs:
    """Log-probabilities under a role at temperature 1, read from a folder or else computed and written to it.

    Several processes may use the folder at once: a file appears whole or not at all.

    Args:
        backbone: the model and its roles.
        role: whose log-probabilities.
        prompts: N lists of token ids.
        responses: N lists of token ids, row for row with the prompts.
        folder: where the files are; made if it does not exist.
        batch_size: responses in one forward; changes results by rounding only.
        progress: show a bar while they are computed.
        weights: what :func:`weights_hash` returned for the role, if it is known already.

    Raises:
        UserError: if they must be computed and the folder cannot be written to.
    """
    key = logprobs_key(backbone, role, prompts, responses, weights)
    path = Path(folder) / f"logprobs-{key}.safetensors"
    offsets = torch.tensor([0, *map(len, responses)]).cumsum(0)
    if (logprobs := _read(path, key, offsets)) is not None:
        return logprobs
    _check_writable(path.parent)
    logprobs = compute_logprobs(backbone, role, prompts, responses, batch_size, progress)
    _write(path, logprobs, {"key": key, "role": role, "model": backbone.settings.model})
    return logprobs


@torch.no_grad()
def compute_logprobs(
    backbone: PolicyBackbone,
    role: str,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    batch_size: int = 16,
    progress: bool = True,
) -> ResponseLogprobs:
    """Log-probabilities under a role at temperature 1; see :func:`cached_logprobs` for the arguments.

    Batches hold responses of like length, the longest first, so that there is little padding and a device that is too
    small says so at once.
    """
    device = backbone.model_of(role).device
    offsets = torch.tensor([0, *map(len, responses)]).cumsum(0)
    values = torch.empty(0)
    order = sorted(range(len(responses)), key=lambda row: len(prompts[row]) + len(responses[row]), reverse=True)
    bar = tqdm(
        total=len(order),
        desc=f"Log-probabilities of {role}",
        disable=not progress,
        file=sys.stdout,
        mininterval=0.1 if sys.stdout.isatty() else SECONDS_BETWEEN_LINES,
    )
    with bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            sequences = Sequences.from_lists(
                [prompts[row] for row in rows], [responses[row] for row in rows], backbone.chat.pad_id
            )
            logprobs = backbone.token_logprobs(role, sequences.to(device))[0].cpu()
            if start == 0:
                values = torch.empty(int(offsets[-1]), dtype=logprobs.dtype)
            for row, given in zip(rows, logprobs, strict=True):
                values[offsets[row] : offsets[row + 1]] = given[: len(responses[row])]
            bar.update(len(rows))
    return ResponseLogprobs(values, offsets)


def logprobs_key(
    backbone: PolicyBackbone,
    role: str,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    weights: str | None = None,
) -> str:
    """SHA-256 in hex of all that the log-probabilities follow from; see :func:`cached_logprobs` for the arguments."""
    settings, device = backbone.settings, backbone.model_of(role).device.type
    parts = {
        "format": FORMAT,
        "transformers": transformers.__version__,  # holds the code of the models
        "weights": weights or weights_hash(backbone, role),
        "vocabulary": backbone.chat.fingerprint,
        "dtype": settings.dtype,
        "quantization": settings.quantization,
        "attention": settings.attention,
        "device": device,
        "autocast": str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None,
        "matmul": torch.get_float32_matmul_precision(),
        "sequences": _sequences_hash(prompts, responses),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def weights_hash(backbone: PolicyBackbone, role: str) -> str:
    """SHA-256 in hex of every weight that a role computes with, as it is held in memory, and of the model's shape.

    Adapters of other roles do not enter, nor does what the model, the role or its folder is called. It reads all
    weights once, which takes a second for each gigabyte or so.
    """
    played = backbone.roles[role]
    model = backbone.model_of(role)
    of_others: set[int] = set()
    scales: list[float] = []
    if played.model == BASE:
        bank = backbone.adapters
        of_others = {id(w) for name in bank.names if name != played.adapter for w in bank.parameters(name)}
        layers: Iterator[Any] = (layer for layer in model.modules() if isinstance(layer, BaseTunerLayer))
        scales = [float(layer.scaling[played.adapter]) for layer in layers if played.adapter in layer.scaling]
    config = json.loads(model.config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    digest = hashlib.sha256(json.dumps([config, scales], sort_keys=True).encode())
    if backbone.settings.trust_remote_code:
        digest.update(Path(inspect.getfile(type(model))).read_bytes())
    for name, weight in sorted(model.state_dict(keep_vars=True).items()):
        if id(weight) in of_others:
            continue
        name = name.replace(".base_layer.", ".").replace(f".{played.adapter}.", ".")
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(_bytes(weight.detach().cpu()))
    return digest.hexdigest()


# Inside ---------------------------------------------------------------------------------------------------------


def _sequences_hash(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> str:
    """Of the ids and of where each prompt and response ends."""
    digest = hashlib.sha256()
    for prompt, response in zip(prompts, responses, strict=True):
        digest.update(np.array([len(prompt), len(response), *prompt, *response], dtype="<i8").tobytes())
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    """The memory of a tensor, of any data type."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _checksum(logprobs: ResponseLogprobs) -> str:
    return hashlib.sha256(_bytes(logprobs.values)).hexdigest()


def _read(path: Path, key: str, offsets: Tensor) -> ResponseLogprobs | None:
    """The contents of a file; None if there is none or it is damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            logprobs = ResponseLogprobs(file.get_tensor("logprobs"), file.get_tensor("offsets"))
        whole = torch.equal(logprobs.offsets, offsets) and metadata.get("checksum") == _checksum(logprobs)
        reason = None if whole and metadata.get("key") == key else "its contents are not those that were written"
    except (OSError, SafetensorError) as error:
        reason = str(error)
    if reason is None:
        return logprobs
    _log.warning("%s is damaged (%s); its log-probabilities are computed again.", path, reason)
    return None


def _check_writable(folder: Path) -> None:
    """Before the work, which may take hours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"log-probabilities cannot be kept in {folder} ({error.strerror}); name a folder that can be written to."
        ) from error


def _write(path: Path, logprobs: ResponseLogprobs, description: dict[str, str]) -> None:
    """Under another name first, so that no process ever sees a part of the file."""
    description = {**description, "checksum": _checksum(logprobs)}
    # In memory, since safetensors gives a file that it writes itself to its owner alone.
    contents = save({"logprobs": logprobs.values, "offsets": logprobs.offsets}, description)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        temporary.write_bytes(contents)
        os.replace(temporary, path)
    except OSError as error:  # the disk is full; the run can go on
        _log.warning("log-probabilities could not be kept in %s (%s).", path, error.strerror)
    finally:
        temporary.unlink(missing_ok=True)
