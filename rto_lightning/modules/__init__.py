"""The stages as LightningModules: SFT, preference (DPO), reward model, RTO. They order events; others do the maths."""

from rto_lightning.modules.numerics import NumericsSettings
from rto_lightning.modules.pair_logprobs import PairLogprobs, cached_pair_logprobs
from rto_lightning.modules.preference import Answers, PreferenceModule
from rto_lightning.modules.replay import replay
from rto_lightning.modules.reward_model import RewardModelModule
from rto_lightning.modules.rto import RTOModule
from rto_lightning.modules.schedules import CosineWithWarmup
from rto_lightning.modules.sft import SFTModule
from rto_lightning.modules.stage import StageModule

__all__ = [
    "Answers",
    "CosineWithWarmup",
    "NumericsSettings",
    "PairLogprobs",
    "PreferenceModule",
    "RTOModule",
    "RewardModelModule",
    "SFTModule",
    "StageModule",
    "cached_pair_logprobs",
    "replay",
]
