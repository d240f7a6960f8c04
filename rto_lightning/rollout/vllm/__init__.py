"""Rollouts with vLLM: an engine beside the model that is trained, to which weights are handed over when they change."""

from rto_lightning.backbone import PolicyBackbone
from rto_lightning.rollout.settings import RolloutSettings
from rto_lightning.rollout.vllm.client import Client, EngineStopped, Sample
from rto_lightning.rollout.vllm.colocated import ColocatedClient
from rto_lightning.rollout.vllm.engine import VLLMEngine
from rto_lightning.rollout.vllm.server import ServerClient

__all__ = ["Client", "EngineStopped", "Sample", "VLLMEngine", "build_vllm_engine"]


def build_vllm_engine(backbone: PolicyBackbone, settings: RolloutSettings) -> VLLMEngine:
    """The engine of `settings.vllm.mode`, which starts at its first rollout."""
    make = ServerClient if settings.vllm.mode == "server" else ColocatedClient
    return VLLMEngine(backbone, settings, make)
