"""Rollouts by vLLM: hand the weights over, sample, and start the engine again once if it crashes.

Ranks that share a server agree at every step: the first of them starts it and loads weights, the others wait. A crash
that one rank meets makes all of them begin the rollout again, since sharded weights are gathered by all ranks together.
"""

import shutil
import socket
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from rto_lightning.backbone import PolicyBackbone, ValueHead
from rto_lightning.backbone.role_bank import BASE
from rto_lightning.backbone.sequences import pad_right
from rto_lightning.errors import UserError
from rto_lightning.parallel import gather_objects, rank
from rto_lightning.rollout.settings import RolloutSettings
from rto_lightning.rollout.trajectory import Trajectory
from rto_lightning.rollout.vllm.client import Client, EngineStopped, Sample, engine_arguments
from rto_lightning.rollout.vllm.transfer import transfer_folder, weights_digest, write_model

Digest = tuple[float, ...]


@dataclass(frozen=True)
class Adapter:
    """An adapter that the engine knows."""

    name: str
    digest: Digest
    folder: Path


class VLLMEngine:
    """Samples a response to each prompt as one role of the backbone, whose weights vLLM is given whenever they changed.

    It starts at the first rollout and runs until `close`, or until this object is gone.

    Args:
        backbone: the model and its roles.
        settings: length, temperature, and where vLLM runs.
        make_client: makes what talks to the engine.
    """

    def __init__(
        self,
        backbone: PolicyBackbone,
        settings: RolloutSettings,
        make_client: Callable[[PolicyBackbone, RolloutSettings], Client],
    ) -> None:
        self.backbone = backbone
        self.settings = settings
        self.client = make_client(backbone, settings)
        self.restarted = False
        self._running = False
        self._leads = True
        self._adapters: dict[str, Adapter] = {}
        self._model: tuple[str, Digest] = (BASE, ())
        self._handed_over = 0
        self._folder: Path | None = None
        self._writes = True
        self._run = ""
        if backbone.settings.quantization is not None and "quantization" not in settings.vllm.engine_options:
            rank_zero_warn(
                "vLLM samples from the base as it is stored, and training reads it in "
                f"{backbone.settings.quantization}: watch rollout/mismatch, set ppo.importance_weight_cap, or let vLLM "
                "quantize the base too by model.rollout.vllm.engine_options {quantization: bitsandbytes}."
            )

    def rollout(
        self,
        role: str,
        input_ids: Tensor,
        attention_mask: Tensor,
        seeds: list[int],
        *,
        with_logprobs: bool = False,
        value_head: ValueHead | None = None,
    ) -> Trajectory:
        """As :meth:`RolloutEngine.rollout`, with `engine_logprobs`.

        The same seed and prompt give the same response in this engine as far as its arithmetic does, whatever stands
        beside it; they give another one than the transformers engine. Log-probabilities and values of the model that is
        trained are not known here.

        Raises:
            UserError: if the engine does not start, crashes a second time, or has no room for prompt and response.
        """
        rows = zip(input_ids, attention_mask.bool(), strict=True)
        samples = self._sample(role, [ids[mask].tolist() for ids, mask in rows], seeds)
        pad_id, device = self.backbone.chat.pad_id, input_ids.device
        responses, _ = pad_right([sample.tokens for sample in samples], pad_id)
        logprobs = torch.zeros(responses.shape)
        for row, sample in zip(logprobs, samples, strict=True):
            row[: len(sample.logprobs)] = torch.tensor(sample.logprobs)
        tokens = torch.cat([input_ids, responses.to(device)], dim=1)
        stop_ids = self.backbone.chat.stop_ids
        return Trajectory.from_tokens(tokens, attention_mask, stop_ids, role, engine_logprobs=logprobs.to(device))

    def close(self) -> None:
        """End the engine and remove what was written for it; the next rollout starts it again."""
        self.client.close()
        if self._folder is not None and self._writes:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._running, self._folder = False, None
        self._adapters, self._model = {}, (BASE, ())

    # Inside -----------------------------------------------------------------------------------------------------

    def _sample(self, role: str, prompts: list[list[int]], seeds: list[int]) -> list[Sample]:
        """A response to each prompt; a crash of the engine is survived once in a run."""
        while True:
            said, samples = self._try_to_sample(role, prompts, seeds)
            if said is None:
                return samples
            if self.restarted:
                raise UserError(
                    f"vLLM stopped a second time in this run, and said last: {said}; cure that, give it more memory by "
                    "model.rollout.vllm, or set model.rollout.engine to transformers."
                )
            rank_zero_warn(f"vLLM stopped, and said last: {said}. It is started again, once in a run.")
            self.restarted = True
            self.close()

    def _try_to_sample(self, role: str, prompts: list[list[int]], seeds: list[int]) -> tuple[str | None, list[Sample]]:
        """What an engine said when it stopped, on whatever rank, or None; and the responses."""
        if not self._running:
            self._start()
        self._check_length(prompts)
        adapter, said = self._hand_over(role)
        if said is not None:
            return said, []
        samples: list[Sample] = []
        try:
            samples = self.client.sample(prompts, seeds, adapter)
            self._check_ends(samples)
        except EngineStopped as error:
            said = str(error)
        return _first(gather_objects(said)), samples

    def _start(self) -> None:
        place, machine = self.client.place, socket.gethostname()
        leader = gather_objects(place).index(place)
        writer = gather_objects(machine).index(machine)
        self._leads, self._writes = leader == rank(), writer == rank()
        address = gather_objects(self.client.start() if self._leads else "")[leader]
        if not self._leads:
            self.client.connect(address)
        own = transfer_folder(self.settings.vllm.transfer_folder) if self._writes else None
        self._folder = gather_objects(own)[writer]
        assert self._folder is not None
        if self._writes:
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        # Other runs may have adapters on the same server.
        self._run = gather_objects(self._folder.name)[0]
        self._running = True

    def _hand_over(self, role: str) -> tuple[str | None, str | None]:
        """Give the engine the weights of a role if it has others.

        Returns:
            Name of the adapter to sample with, or None for none; what an engine said when it stopped, or None.
        """
        played = self.backbone.roles[role]
        said = self._hand_over_model(played.model)
        if said is None and played.adapter is not None:
            said = self._hand_over_adapter(played.adapter)
        adapter = self._adapters.get(played.adapter or "")
        return adapter.name if adapter is not None else None, said

    def _hand_over_model(self, name: str) -> str | None:
        if name == BASE == self._model[0]:
            return None  # frozen, and the engine has loaded it itself
        model: Any = self.backbone.models[name]
        self._check_output_layer(model)
        digest = weights_digest(model.parameters())
        if not any(gather_objects((name, digest) != self._model)):
            return None
        folder = self._new_folder(name)
        write_model(model, folder, self._dtype, self._writes)
        said = self._tell(lambda: self.client.load_weights(folder))
        self._remove(folder)
        self._model = (name, digest)
        return said

    def _hand_over_adapter(self, name: str) -> str | None:
        known, digest = self._adapters.get(name), weights_digest(self.backbone.adapters.parameters(name))
        if not any(gather_objects(known is None or known.digest != digest)):
            return None
        folder = self._new_folder(name)
        if self._writes:
            self.backbone.adapters.save(name, folder)
        new = Adapter(f"{self._run}-{folder.name}", digest, folder)

        def replace() -> None:
            if known is not None:
                self.client.remove_adapter(known.name)
            self.client.add_adapter(new.name, folder)

        said = self._tell(replace)
        if known is not None:
            self._remove(known.folder)
        self._adapters[name] = new
        return said

    def _tell(self, action: Callable[[], None]) -> str | None:
        """Let each engine be told something by one rank; returns what one said when it stopped, or None."""
        gather_objects(None)  # until every file is written
        said = None
        if self._leads:
            try:
                action()
            except EngineStopped as error:
                said = str(error)
        return _first(gather_objects(said))

    def _new_folder(self, name: str) -> Path:
        assert self._folder is not None
        self._handed_over += 1
        folder = self._folder / f"{name}-{self._handed_over}"
        if self._writes:
            folder.mkdir()
        return folder

    def _remove(self, folder: Path) -> None:
        if self._writes:
            shutil.rmtree(folder)

    @property
    def _dtype(self) -> torch.dtype:
        """In which full weights are handed over: that of the engine."""
        dtype: torch.dtype = getattr(torch, engine_arguments(self.backbone, self.settings)["dtype"])
        return dtype

    def _check_output_layer(self, model: Any) -> None:
        """On a CPU vLLM packs the output layer, and leaves it as it was when the embeddings it is tied to change."""
        on_cpu = not self.settings.vllm.urls and not torch.cuda.is_available()
        if on_cpu and model.config.get_text_config().tie_word_embeddings:
            raise UserError(
                "vLLM on a CPU does not take new weights for a model whose output layer is its embedding; use mode "
                "adapters, rollout.engine transformers, or a GPU."
            )

    def _check_length(self, prompts: list[list[int]]) -> None:
        longest, limit, room = max(map(len, prompts)), self.settings.max_new_tokens, self.client.max_model_len
        if longest + limit > room:
            raise UserError(
                f"a prompt of {longest} tokens and rollout.max_new_tokens {limit} do not fit the {room} tokens that "
                "vLLM has room for; raise model.rollout.vllm.max_model_len or gpu_memory_utilization, or shorten them."
            )

    def _check_ends(self, samples: list[Sample]) -> None:
        """Responses end with a stop id or at the limit, unless the server gave them up."""
        stop_ids, limit = self.backbone.chat.stop_ids, self.settings.max_new_tokens
        for tokens, _ in samples:
            if len(tokens) != limit and not (tokens and tokens[-1] in stop_ids):
                raise EngineStopped(f"a response of {len(tokens)} tokens, which it broke off")


def _first(said: list[str | None]) -> str | None:
    """What the first engine of those that stopped has said."""
    return next((words for words in said if words is not None), None)
