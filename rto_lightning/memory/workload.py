"""What a stage holds in memory and what it computes there, as far as memory depends on it."""

from dataclasses import dataclass
from typing import Literal

from lightning.pytorch.cli import OptimizerCallable

from rto_lightning.backbone import BackboneSettings, LoraSettings
from rto_lightning.memory.parallelism import ONE_PROCESS, Parallelism

Reading = Literal["logprobs", "logprobs and entropy", "logprobs and values", "divergence", "values", "score"]
"""What a forward is for: log-probabilities of the response, also with the entropy before each token or with values off
the same hidden states; the same with the KL divergence from `reference`; values of each token; one score."""


@dataclass(frozen=True)
class RoleWeights:
    """The weights of one role."""

    name: str
    """The role."""
    kind: Literal["base", "adapter", "model", "shared"]
    """`base` has none of its own, `adapter` a LoRA adapter on the base, `model` a model of its own; `shared` is a head
    on the hidden states of the policy."""
    lora: LoraSettings | None = None
    """Shape of the adapter."""
    source: str | None = None
    """Folder or hub name of the model of its own; None has the shape of the base."""
    master: bool = False
    """Held in the data type of trained weights."""
    head: bool = False
    """Read through a scalar head."""
    optimizer: OptimizerCallable | None = None
    """Of a trained role."""

    @property
    def trained(self) -> bool:
        """Whether gradients reach it."""
        return self.optimizer is not None


@dataclass(frozen=True)
class OutsideModel:
    """A reward model that shares nothing with the base."""

    source: str
    """Folder or hub name of a sequence-classification model."""


@dataclass(frozen=True)
class Forward:
    """One forward, perhaps with its backward."""

    role: str
    """Who computes: a role, or the source of an outside model."""
    reading: Reading
    """What for."""
    rows: int
    """Sequences in it, each as long as the limits allow."""
    backward: bool = False
    """Whether gradients are computed."""


@dataclass(frozen=True)
class Rollout:
    """Sampling from a role."""

    role: str
    """Who speaks."""
    rows: int
    """Responses that are sampled at a time."""
    new_tokens: int
    """Length limit of a response."""
    with_logprobs: bool = False
    """Whether log-probabilities and entropies are kept."""
    prompts: int | None = None
    """Different prompts among them at most, which are neighbours and read once; None if each row has its own."""


@dataclass(frozen=True)
class Phase:
    """What is done at a time; of its parts one after the other is in memory."""

    name: str
    """What a table calls it."""
    parts: tuple[Forward | Rollout, ...]
    """What is computed."""
    trains: tuple[str, ...] = ()
    """Roles whose gradients are held, and whose optimizers then step."""
    copies_base: bool = False
    """Whether the base model is loaded for this phase alone."""


@dataclass(frozen=True)
class Passes:
    """How often a process runs one model for one thing in an iteration."""

    phase: str
    """What a table calls the phase."""
    role: str
    """Who computes: a role, or the source of an outside model."""
    reading: Reading
    """What for."""
    rows: int
    """Sequences in all, each as long as the limits allow."""
    batches: int
    """Forwards in which these are read; of a rollout, batches that are sampled one after the other."""
    steps: int = 0
    """Optimizer steps, before each of which gradients are summed over processes; 0 without a backward."""
    new_tokens: int = 0
    """Length limit of responses that are sampled; 0 where whole sequences are read."""


@dataclass(frozen=True)
class Workload:
    """One stage."""

    stage: str
    """Its name, such as `rto`."""
    backbone: BackboneSettings
    """How the base model is held."""
    roles: tuple[RoleWeights, ...]
    """Who is in memory."""
    phases: tuple[Phase, ...]
    """What is done."""
    prompt_tokens: int
    """The longest prompt."""
    response_tokens: int
    """The longest response."""
    batch: str
    """The batch sizes, in words."""
    precision: str = "32-true"
    """The trainer's."""
    samples: int = 0
    """Responses of an iteration over all processes, whose figures for each token are kept; 0 where a batch is all there
    is."""
    outside: tuple[OutsideModel, ...] = ()
    """Reward models that share nothing with the base."""
    parallelism: Parallelism = ONE_PROCESS
    """How the stage is spread; roles, phases and passes are those of one process."""
    passes: tuple[Passes, ...] = ()
    """Everything that is read, sampled and trained on in an iteration; of other stages than RTO, with a batch."""

    @property
    def holds_base(self) -> bool:
        """Whether the base model is in memory all the time."""
        return any(role.kind in ("base", "adapter") for role in self.roles)

    @property
    def tokens(self) -> int:
        """Prompt and response."""
        return self.prompt_tokens + self.response_tokens
