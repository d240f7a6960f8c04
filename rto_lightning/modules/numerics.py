"""Keeps NaN and infinity from the weights: a step that rests on one stops the run or is left out.

Every stage asks before a step of an optimizer. The answer lies in the norm of the gradient, which all ranks share: a
loss that is not finite, or that rests on something that is not, becomes NaN, and with it the gradient on every rank. So
it takes one number a step from the device and no collective; which tensor it was is looked up only then.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from rto_lightning.backbone import Message
from rto_lightning.errors import UserError, check_settings
from rto_lightning.modules.dumps import write_dump
from rto_lightning.modules.experience import Experience
from rto_lightning.modules.finite import (
    Named,
    NonFinite,
    all_finite,
    experience_tensors,
    first_nonfinite,
    gradients,
    losses,
)
from rto_lightning.parallel import gather_objects, gradient_norm, rank, ranks

if TYPE_CHECKING:
    from rto_lightning.modules.rto import RTOModule
    from rto_lightning.modules.stage import StageModule

NORM = "the gradient norm"
"""What a sentence calls it; it can overflow where every gradient is finite."""
MOST_DUMPS = 10
"""Files in the folder of dumps from which on a step that is left out writes none."""


@dataclass(frozen=True)
class NumericsSettings:
    """What happens when a loss, reward, value, advantage or gradient is NaN or infinite. No weight is trained on it."""

    action: Literal["stop", "skip"] = "stop"
    """`stop` ends the run with an error; `skip` leaves the step out, in RTO the iteration or the one minibatch, warns,
    and goes on. The step counts in `global_step` and schedules."""
    max_skipped_in_a_row: int = 5
    """Steps in a row that may be left out, in RTO iterations with something left out; one more stops the run."""
    folder: str | None = None
    """Where the batch of such a step is kept for `rto_lightning.modules.replay`; null is `nonfinite/` in
    `trainer.default_root_dir`."""

    def __post_init__(self) -> None:
        """Raise UserError for values that no run can use."""
        check_settings("model.numerics", self, not_negative=("max_skipped_in_a_row",))


class NumericsGuard:
    """Decides about the steps of one stage, and counts those that are left out.

    Args:
        settings: what to do.
    """

    def __init__(self, settings: NumericsSettings) -> None:
        self.settings = settings
        self.skipped_steps = 0
        """Training steps in which something was left out."""
        self.skipped_in_a_row = 0
        """Of these the last ones that follow one another."""
        self.last_skipped = -2
        """Number of the last one."""
        self.watched: list[tuple[Any, dict[str, Tensor]]] = []
        """Batches of the step at hand, each with what its loss rests on and the loss."""

    def watch(self, batch: Any, loss: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Remember a batch until its step is decided about.

        Args:
            batch: of the data module.
            loss: of the batch, a scalar.
            tensors: what the loss rests on, by name, in the order of computation.

        Returns:
            The loss; NaN, and so is its gradient, if it or one of the tensors is not finite.
        """
        kept = {name: tensor.detach() for name, tensor in (*tensors.items(), ("the loss", loss))}
        self.watched.append((batch, kept))
        return loss * torch.where(all_finite(kept.values()), 1.0, math.nan)

    def watched_passes(self, stage: "StageModule") -> bool:
        """As :meth:`passes`, for the step on the batches that were watched; forgets them."""
        weights = stage.backbone.trained_parameters(stage.trained_role)
        norm = gradient_norm(weights)
        watched = chain.from_iterable(tensors.items() for _, tensors in self.watched)
        passes = self.passes(
            stage, norm.isfinite(), chain(watched, gradients(stage, weights), [(NORM, norm)]), self._watched_contents
        )
        self.watched.clear()
        return passes

    def passes(
        self, stage: "StageModule", finite: Tensor, tensors: Named, contents: Callable[[], dict[str, Any]]
    ) -> bool:
        """Whether a step may be taken; every rank has to ask.

        Args:
            stage: whose step it is.
            finite: whether everything is finite, a bool scalar that is the same on all ranks.
            tensors: where the culprit is looked for if not, those computed first to the front.
            contents: makes what the dump holds of the batch, the same on all ranks.

        Raises:
            UserError: if something is not finite and the settings say stop, or too many steps were left out in a row.
        """
        if bool(finite):
            return True
        step = stage.global_step
        if step == self.last_skipped and self.settings.action == "skip":  # another minibatch of a known iteration
            return False
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if step == self.last_skipped + 1 else 1
        self.skipped_steps, self.last_skipped = self.skipped_steps + 1, step
        on_ranks = enumerate(gather_objects(first_nonfinite(tensors)))
        _, of_rank, first = min((found.place, of_rank, found) for of_rank, found in on_ranks if found is not None)
        dump = self._write_dump(stage, first, of_rank, contents())
        unit = "iteration" if stage.stage_name == "rto" else "step"
        where = f"{unit} {step} of the {stage.stage_name} stage" + (f" on rank {of_rank}" if ranks() > 1 else "")
        what = (
            f"{first.bad} of {first.size} values of {first.name} are NaN or infinite in {where}; no weight was trained "
            f"on them, and the batch is {dump}"
        )
        cure = "look at it with rto_lightning.modules.replay, lower the learning rate"
        if self.settings.action == "stop":
            raise UserError(f"{what}; {cure}, or set model.numerics.action to skip to leave such {unit}s out.")
        if self.skipped_in_a_row > self.settings.max_skipped_in_a_row:
            count = f"as this is {unit} {self.skipped_in_a_row} of its kind in a row, the run stops"
            raise UserError(f"{what}; {count}: {cure}, or raise model.numerics.max_skipped_in_a_row.")
        rank_zero_warn(f"{what}; {unit}s with something left out: {self.skipped_steps}.")
        return False

    def state(self) -> list[int]:
        """What a checkpoint keeps of the counts; nothing while all steps were taken."""
        return [self.skipped_steps, self.skipped_in_a_row, self.last_skipped] if self.skipped_steps else []

    def restore(self, state: list[int]) -> None:
        """Take over what `state` returned."""
        self.skipped_steps, self.skipped_in_a_row, self.last_skipped = state or (0, 0, -2)

    def _watched_contents(self) -> dict[str, Any]:
        plain = [asdict(batch.to("cpu")) for batch, _ in self.watched]
        batches = list(chain.from_iterable(gather_objects(plain)))
        return {"kind": type(self.watched[0][0]).__name__, "batches": batches}

    def _write_dump(self, stage: "StageModule", found: NonFinite, of_rank: int, contents: dict[str, Any]) -> str:
        """Rank 0 writes it; what all ranks then say of it."""
        said = ""
        if rank() == 0:
            folder = Path(self.settings.folder or Path(stage.trainer.default_root_dir) / "nonfinite")
            if self.settings.action == "skip" and len(list(folder.glob("*.pt"))) >= MOST_DUMPS:
                said = f"not kept, since {folder} holds {MOST_DUMPS} already"
            else:
                path = folder / f"step-{stage.global_step}.pt"
                try:
                    write_dump(stage, path, {**contents, "found": {**asdict(found), "rank": of_rank}})
                    said = f"kept in {path}"
                except OSError as error:  # a full disk must neither hide the error nor end a run that skips
                    said = f"not kept ({error})"
        return gather_objects(said)[0]


class IterationGuard(NumericsGuard):
    """Decides about the iterations of RTO and about the steps in them."""

    prompts: list[list[Message]] = []
    """The messages of this rank's prompts."""

    def experience_passes(self, stage: "RTOModule", experience: Experience) -> bool:
        """As :meth:`passes`, for an iteration by what its update would rest on."""
        finite = all_finite(tensor for _, tensor in experience_tensors(experience, stage.source_names))
        own = experience_tensors(experience, stage.source_names, own=True)
        return self.passes(stage, finite, own, lambda: self._contents(experience))

    def step_passes(
        self,
        stage: "RTOModule",
        experience: Experience,
        role: str,
        rows: Tensor,
        metrics: Mapping[str, Tensor],
        norm: Tensor,
    ) -> bool:
        """As :meth:`passes`, for one minibatch.

        Args:
            stage: whose step it is.
            experience: of all ranks.
            role: `policy` or `critic`.
            rows: of the minibatch, (M,) int64.
            metrics: of the minibatch; the losses among them are looked at.
            norm: of the role's gradient over all ranks.
        """
        of_role = losses(metrics)
        finite = all_finite([norm, *(loss for _, loss in of_role)])
        found_in = chain(of_role, gradients(stage, stage.backbone.trained_parameters(role)), [(NORM, norm)])
        return self.passes(stage, finite, found_in, lambda: self._contents(experience, role, rows))

    def _contents(self, experience: Experience, role: str | None = None, rows: Tensor | None = None) -> dict[str, Any]:
        messages = list(chain.from_iterable(gather_objects(self.prompts)))
        return {"experience": asdict(experience), "messages": messages, "role": role, "rows": rows}
