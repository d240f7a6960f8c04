"""From prompts to trajectories: sampling engines and what they return."""

from rto_lightning.rollout.engine import RolloutEngine, build_engine
from rto_lightning.rollout.sampling import sample_seeds
from rto_lightning.rollout.settings import RolloutSettings, VLLMSettings
from rto_lightning.rollout.trajectory import Trajectory, response_texts
from rto_lightning.rollout.transformers_engine import TransformersEngine

__all__ = [
    "RolloutEngine",
    "RolloutSettings",
    "Trajectory",
    "TransformersEngine",
    "VLLMSettings",
    "build_engine",
    "response_texts",
    "sample_seeds",
]
