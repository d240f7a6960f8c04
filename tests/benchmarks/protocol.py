"""What the benchmark runs: methods, tried configurations, seeds. `plan.py` says in which order.

A: learning rate and KL coefficient, shared by all methods and chosen for PPO, so that nothing is chosen for RTO.
B: of every method the same number of configurations of its own, on the same seeds.
C: the chosen configuration of every method on fresh seeds, and direct preference learning beside them.
D: a sweep of RTO's beta_1 and clip, on the seeds of B.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from rto_lightning.cli.pipeline_settings import StageSettings, load_pipeline

CONFIGS = Path(__file__).parents[2] / "configs" / "quickstart"
GoldName = Literal["sum", "requirement"]
"""As in rto_lightning/quickstart/gold.py, which is not imported: `status` and `report` need no torch."""
Settings = dict[str, Any]
"""Settings by their short names; `cells.py` knows the options of the command that they stand for."""


def grid(**values: Sequence[Any]) -> tuple[Settings, ...]:
    """Every combination of the given values, the last name varying fastest."""
    return tuple(dict(zip(values, row, strict=True)) for row in itertools.product(*values.values()))


@dataclass(frozen=True)
class Method:
    """One line of the table."""

    name: str
    """In names of cells and on the command line."""
    title: str
    """In tables and figures."""
    fixed: Settings
    """What makes it this method."""
    tried: tuple[Settings, ...] = ({},)
    """Configurations of its own, of which stage B chooses one."""
    nearest_kl_of: str | None = None
    """Take the runs of the method of this name, and choose the configuration whose KL is nearest to the baseline's
    instead of the one with the highest gold reward."""

    @property
    def runs_of(self) -> str:
        """The method in the names of its cells."""
        return self.nearest_kl_of or self.name


# The paper's values, and three with a wider clip, which stage D had shown on the same tuning seeds to be better.
_TOKEN_REWARDS = tuple(
    {"beta_1": beta_1, "token_reward_clip": clip}
    for beta_1, clip in ((0.05, 0.05), (0.05, 0.3), (0.1, 0.3), (0.3, 0.3))
)
_GROUPS = grid(responses_per_prompt=(4, 8))

METHODS = (
    Method("ppo", "PPO", {"beta_1": 0.0}, grid(lam=(0.95, 1.0), clip_range=(0.2, 0.4))),
    Method("rto", "RTO", {"granularity": "token"}, _TOKEN_REWARDS),
    Method("rto_at_kl", "RTO at PPO's KL", {"granularity": "token"}, _TOKEN_REWARDS, nearest_kl_of="rto"),
    Method("semi_rto", "Semi-RTO", {"granularity": "sentence"}, _TOKEN_REWARDS),
    Method("ddpo", "DDPO", {"granularity": "delayed"}, _TOKEN_REWARDS),
    Method("rs_ppo", "RS-PPO", {"granularity": "shaping"}, _TOKEN_REWARDS),
    Method(
        "reinforce_pp",
        "REINFORCE++",
        {"estimator": "reinforce++", "beta_1": 0.0},
        grid(gamma=(1.0, 0.98), clip_range=(0.2, 0.4)),
    ),
    Method("rto_reinforce_pp", "RTO-REINFORCE++", {"estimator": "reinforce++"}, _TOKEN_REWARDS),
    Method(
        "rloo",
        "RLOO",
        {"estimator": "rloo", "beta_1": 0.0},
        grid(responses_per_prompt=(4, 8), clip_range=(0.2, 0.4)),
    ),
    Method(
        "rto_rloo",
        "RTO-RLOO",
        {"estimator": "rloo"},
        tuple({**group, **rewards} for group in _GROUPS for rewards in _TOKEN_REWARDS[1:3]),
    ),
    Method(
        "grpo",
        "GRPO",
        {"estimator": "grpo", "beta_1": 0.0},
        grid(responses_per_prompt=(4, 8), clip_range=(0.2, 0.4)),
    ),
    Method(
        "rto_grpo",
        "RTO-GRPO",
        {"estimator": "grpo"},
        tuple({**group, **rewards} for group in _GROUPS for rewards in _TOKEN_REWARDS[1:3]),
    ),
)
"""All learn online, from the same number of sampled responses."""

BASELINE = "ppo"

PREFERENCE_TITLES = {
    "dpo": "DPO",
    "cdpo": "cDPO",
    "ipo": "IPO",
    "rdpo": "R-DPO",
    "simpo": "SimPO",
    "tdpo1": "TDPO1",
    "tdpo2": "TDPO2",
}
"""Direct preference learning: stages of configs/quickstart/methods.yaml, one configuration each."""

SWEEP = grid(beta_1=(0.1, 0.3, 1.0), token_reward_clip=(0.1, 0.3, 1.0, 0.0))
"""Stage D; a clip of 0 is off."""


@dataclass(frozen=True)
class Protocol:
    """How much of it is run."""

    golds: tuple[GoldName, ...] = ("sum", "requirement")
    tuning_seeds: tuple[int, ...] = (0, 1, 2)
    fresh_seeds: tuple[int, ...] = (3, 4, 5, 6, 7)
    iterations: int = 40
    responses: int = 64
    """Sampled responses an iteration, whatever the number of prompts they answer."""
    minibatch: int = 32
    """Responses an optimizer step."""
    shared: tuple[Settings, ...] = grid(lr=(1e-4, 3e-4, 1e-3), beta_2=(0.05, 0.2))
    """Tried in stage A. `lr` is that of policy and critic."""
    methods: tuple[Method, ...] = METHODS
    preference_methods: tuple[Method, ...] = ()
    """Their `fixed` holds options of the command, as in the pipeline they come from."""
    sweep: tuple[Settings, ...] = SWEEP
    preparation: Mapping[str, Settings] = field(
        default_factory=lambda: {"preferences": {"pairs": 8000, "validation_pairs": 1000}}
    )
    """Options of the preparing stages beyond configs/quickstart, by stage."""


FULL = Protocol()
QUICK = Protocol(
    tuning_seeds=(0,),
    fresh_seeds=(1,),
    iterations=3,
    shared=FULL.shared[-1:],
    methods=tuple(Method(method.name, method.title, method.fixed, method.tried[:1]) for method in METHODS),
    sweep=SWEEP[:1],
    preparation={
        "sft": {"trainer.max_steps": 150, "model.lr_scheduler.init_args.total_steps": 150},
        "preferences": {"pairs": 512, "validation_pairs": 128},
    },
)
"""A trial of the machinery in minutes; its figures mean nothing."""


def with_preference_methods(protocol: Protocol) -> Protocol:
    """Adds direct preference learning with the settings of configs/quickstart/methods.yaml."""
    found = {stage.name: _settings_of(stage) for stage in load_pipeline(CONFIGS / "methods.yaml").stages}
    methods = tuple(
        Method(name, title, {key: value for key, value in found[name].items() if _is_setting(key, value)})
        for name, title in PREFERENCE_TITLES.items()
    )
    return replace(protocol, preference_methods=methods)


def _settings_of(stage: StageSettings) -> Settings:
    """The settings of the overlays on a stage's first file, and its arguments."""
    overlays = [yaml.safe_load((CONFIGS / file).read_text(encoding="utf-8"))["model"] for file in stage.files[1:]]
    return {**{f"model.{key}": value for model in overlays for key, value in model.items()}, **stage.arguments}


def _is_setting(key: str, value: Any) -> bool:
    """Not a folder of an earlier stage."""
    return key != "model.backbone.model" and not key.startswith("data.") and "{" not in str(value)
