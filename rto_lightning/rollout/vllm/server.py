"""vLLM behind HTTP: a server that runs already, or one that the first rank of each machine starts for all of them.

Used are vLLM's OpenAI-compatible completions with token ids in and out, its requests that load and unload adapters
(`VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`) and, where every weight is trained, those of its development mode
(`VLLM_SERVER_DEV_MODE=1`), which lets whoever reaches the server change its weights: keep it on a private network.
"""

import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2

from rto_lightning.backbone import PolicyBackbone
from rto_lightning.errors import UserError
from rto_lightning.parallel import rank
from rto_lightning.rollout.settings import RolloutSettings
from rto_lightning.rollout.vllm.client import EngineStopped, Sample, engine_arguments, sampling_arguments
from rto_lightning.rollout.vllm.process import ServerProcess

REQUESTS_AT_A_TIME = 256
"""Prompts that wait at the server at a time, unless `rollout.batch_size` says otherwise."""
POLL_SECONDS = 0.5


class ServerClient:
    """A server of vLLM.

    Args:
        backbone: the model and its roles.
        settings: of the rollout.
    """

    max_model_len: int

    def __init__(self, backbone: PolicyBackbone, settings: RolloutSettings) -> None:
        self.backbone = backbone
        self.settings = settings
        self._process: ServerProcess | None = None
        self._logs: TemporaryDirectory[str] | None = None
        self._http: httpx2.Client | None = None
        self._model = ""

    @property
    def place(self) -> str:
        """The server that is asked, or the machine whose server it is."""
        urls = self.settings.vllm.urls
        return urls[rank() % len(urls)] if urls else socket.gethostname()

    def start(self) -> str:
        """As :meth:`Client.start`."""
        vllm = self.settings.vllm
        if vllm.urls:
            address = self.place.rstrip("/")
        else:
            self._logs = TemporaryDirectory(prefix="rto-lightning-vllm-")
            arguments = engine_arguments(self.backbone, self.settings)
            log = Path(self._logs.name) / "server.log"
            self._process = ServerProcess(self.backbone.settings.model, arguments, vllm.port, vllm.devices, log)
            address = self._process.address
        self._wait_until_ready(address, vllm.start_timeout)
        self.connect(address)
        return address

    def connect(self, address: str) -> None:
        """As :meth:`Client.connect`."""
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)  # a server drops idle ones
        self._http = httpx2.Client(
            base_url=address, timeout=self.settings.vllm.rollout_timeout, limits=limits, trust_env=False
        )
        served = self._request("GET", "/v1/models").json()["data"][0]
        self._model, self.max_model_len = served["id"], served["max_model_len"]

    def add_adapter(self, name: str, folder: Path) -> None:
        """As :meth:`Client.add_adapter`."""
        self._request("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})

    def remove_adapter(self, name: str) -> None:
        """As :meth:`Client.remove_adapter`."""
        self._request("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def load_weights(self, folder: Path) -> None:
        """As :meth:`Client.load_weights`."""
        self._request("POST", "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        self._request("POST", "/reset_prefix_cache")

    def sample(self, prompts: Sequence[list[int]], seeds: Sequence[int], adapter: str | None) -> list[Sample]:
        """As :meth:`Client.sample`. A request has one seed, so that there is one for each prompt."""
        shared = sampling_arguments(self.backbone.chat.stop_ids, self.settings)
        shared |= {"model": adapter or self._model, "return_token_ids": True}

        def complete(prompt: list[int], seed: int) -> Sample:
            answer = self._request("POST", "/v1/completions", {**shared, "prompt": prompt, "seed": seed}).json()
            choice = answer["choices"][0]
            return Sample(choice["token_ids"], choice["logprobs"]["token_logprobs"])

        waiting = min(self.settings.batch_size or REQUESTS_AT_A_TIME, len(prompts))
        with ThreadPoolExecutor(waiting) as pool:
            return list(pool.map(complete, prompts, seeds))

    def close(self) -> None:
        """As :meth:`Client.close`."""
        if self._http is not None:
            self._http.close()
        if self._process is not None:
            self._process.close()
        if self._logs is not None:
            self._logs.cleanup()
        self._http = self._process = self._logs = None

    def _request(self, method: str, path: str, content: dict[str, Any] | None = None) -> httpx2.Response:
        """Raises EngineStopped where nothing, or an error of the server's own, comes back."""
        assert self._http is not None
        try:
            response = self._http.request(method, path, json=content)
        except httpx2.TransportError as error:
            raise EngineStopped(self._last_words(str(error) or type(error).__name__)) from error
        if response.status_code >= 500:
            raise EngineStopped(self._last_words(response.text))
        if response.is_error:
            raise UserError(
                f"the vLLM server {self._http.base_url} refused {path} ({response.status_code}: "
                f"{response.text[:500]}); it needs the flags and variables that the README names."
            )
        return response

    def _wait_until_ready(self, address: str, timeout: float) -> None:
        """Raises UserError if the server ends, or is not ready in time."""
        limit = time.monotonic() + timeout
        while time.monotonic() < limit:
            if self._process is not None and self._process.ended():
                raise UserError(
                    f"vLLM did not start: {self._process.last_words()}; model.rollout.vllm is where to change it."
                )
            try:
                if httpx2.get(f"{address}/health", timeout=POLL_SECONDS * 10, trust_env=False).is_success:
                    return
            except httpx2.TransportError:
                pass
            time.sleep(POLL_SECONDS)
        said = f" It said last: {self._process.last_words()}." if self._process is not None else ""
        raise UserError(
            f"the vLLM server {address} was not ready within {timeout:g} seconds; raise "
            f"model.rollout.vllm.start_timeout, or see why it is late.{said}"
        )

    def _last_words(self, otherwise: str) -> str:
        return self._process.last_words() if self._process is not None else otherwise
