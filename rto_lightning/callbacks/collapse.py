"""Stops an RTO run whose policy has collapsed."""

import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

from rto_lightning.callbacks.iterations import RolloutCallback
from rto_lightning.errors import UserError

_METRICS = {
    "kl": "train/kl",
    "entropy": "train/entropy",
    "response_length": "train/response/length",
    "truncated": "train/response/truncated",
}
"""The metric behind each figure."""


class StopOnCollapse(RolloutCallback):
    """Stops training when a figure of the rollouts has been beyond a limit for several iterations in a row.

    The run ends with an error and saves no role, since a later stage of a pipeline would take a collapsed policy for a
    result. Its checkpoints stay: an earlier one can be exported, or gone on from with other settings, if
    `SaveCheckpoints.keep` or a `ModelCheckpoint` has kept it.

        trainer:
          callbacks:
            - class_path: StopOnCollapse
              init_args: {max_kl: 100, min_entropy: 0.05, min_response_length: 5, max_truncated: 0.9}

    A figure that is NaN or infinite counts neither way; `model.numerics` decides about such an iteration.

    Args:
        max_kl: Largest KL divergence from the reference, in nats a response.
        min_entropy: Smallest entropy of the policy, in nats a token.
        max_entropy: Largest entropy of the policy, in nats a token.
        min_response_length: Smallest mean length of a response, in tokens.
        max_response_length: Largest mean length of a response, in tokens.
        max_truncated: Largest share of responses that reached the length limit.
        patience: Iterations in a row beyond a limit after which the run is stopped.

    Raises:
        UserError: if no limit is set, or the patience is below 1.
    """

    def __init__(
        self,
        max_kl: float | None = None,
        min_entropy: float | None = None,
        max_entropy: float | None = None,
        min_response_length: float | None = None,
        max_response_length: float | None = None,
        max_truncated: float | None = None,
        patience: int = 5,
    ) -> None:
        settings = {
            "max_kl": max_kl,
            "min_entropy": min_entropy,
            "max_entropy": max_entropy,
            "min_response_length": min_response_length,
            "max_response_length": max_response_length,
            "max_truncated": max_truncated,
        }
        self.limits = {name: limit for name, limit in settings.items() if limit is not None}
        self.patience = patience
        self.iterations_beyond = dict.fromkeys(self.limits, 0)
        """For each limit the last iterations in a row that were beyond it."""
        if not self.limits:
            raise UserError("StopOnCollapse has no limit; set one, such as max_kl or min_response_length.")
        if patience < 1:
            raise UserError(f"StopOnCollapse has patience {patience}; set it to 1 or more.")

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Count the iteration. The figures are those of all ranks together, which thus stop together.

        Raises:
            UserError: if the patience is exhausted.
        """
        for name, limit in self.limits.items():
            side, _, figure = name.partition("_")
            metric = _METRICS[figure]
            value = float(trainer.callback_metrics[metric])
            if not math.isfinite(value):
                continue
            beyond = value < limit if side == "min" else value > limit
            self.iterations_beyond[name] = self.iterations_beyond[name] + 1 if beyond else 0
            if self.iterations_beyond[name] >= self.patience:
                raise UserError(
                    f"the policy has collapsed: {metric} is {value:.4g} in iteration {trainer.global_step - 1}, "
                    f"beyond {name} {limit:g} for {self.patience} in a row; go on from an earlier checkpoint with a "
                    "higher model.rewards.beta_2 or a lower learning rate, or change StopOnCollapse."
                )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"iterations_beyond": dict(self.iterations_beyond)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on counting, for limits that are still set."""
        kept = state_dict["iterations_beyond"]
        self.iterations_beyond = {name: kept.get(name, 0) for name in self.limits}
