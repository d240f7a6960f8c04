"""From prompts to trajectories: sampling engines and what they return."""

from rto_lightning.rollout.sampling import sample_seeds
from rto_lightning.rollout.trajectory import Trajectory, response_texts
from rto_lightning.rollout.transformers_engine import RolloutSettings, TransformersEngine

__all__ = ["RolloutSettings", "Trajectory", "TransformersEngine", "response_texts", "sample_seeds"]
