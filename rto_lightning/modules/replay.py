"""Run a step again that was not finite, in a notebook for instance."""

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rto_lightning.algorithms import RewardTerms
from rto_lightning.backbone import Sequences
from rto_lightning.data import DemonstrationBatch, PreferenceBatch
from rto_lightning.errors import UserError
from rto_lightning.modules.experience import Experience
from rto_lightning.modules.finite import experience_tensors, gradients, losses
from rto_lightning.modules.ppo_gradients import accumulate_policy_gradients, accumulate_value_gradients
from rto_lightning.modules.rto import RTOModule
from rto_lightning.modules.stage import StageModule
from rto_lightning.rollout import Trajectory

_BATCHES: dict[str, Any] = {batch.__name__: batch for batch in (DemonstrationBatch, PreferenceBatch)}


def replay(module: StageModule, path: Path | str) -> dict[str, Tensor]:
    """Compute a step again that was not finite; no weight is trained.

    Of RTO the responses are read and rewarded again; where a minibatch failed, its losses and gradients are computed
    from the rewards and advantages of the file.

    Args:
        module: the stage, built with the settings of its run. In mode `adapters` the file brings the weights; in mode
            `full` load those of the last checkpoint before the step.
        path: the file.

    Returns:
        Every tensor that is not finite, detached, by the name that the error gave it, in the order of computation;
        nothing if all are finite.

    Raises:
        UserError: if the file is of another stage or of other settings.
    """
    module.configure_model()
    dump = torch.load(path, map_location=module.device, weights_only=True)
    if dump["stage"] != module.stage_name:
        raise UserError(f"{path} is of the {dump['stage']} stage; replay it with that stage's module.")
    if dump["weights"] is not None and (unknown := module.load_state_dict(dump["weights"], strict=False)[1]):
        raise UserError(f"{path} holds {unknown[0]}, which the module lacks; build it with the settings of the run.")
    trainer, module._trainer = module._trainer, None  # a trainer would want to log
    bf16 = dump["precision"] == "bf16-mixed"
    try:
        module.zero_grad(set_to_none=True)
        with torch.autocast(module.device.type, torch.bfloat16) if bf16 else nullcontext(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are trying to `self.log")
            tensors: Any = _iteration(module, dump) if "experience" in dump else _batches(module, dump)  # type: ignore[arg-type]
            return {name: tensor for name, tensor in tensors if not tensor.isfinite().all()}
    finally:
        module.zero_grad(set_to_none=True)
        module._trainer = trainer


def _batches(module: StageModule, dump: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for fields in dump["batches"]:
        batch = _BATCHES[dump["kind"]](**{**fields, "sequences": Sequences(**fields["sequences"])})
        loss: Any = module.training_step(batch, 0)
        _, tensors = module.guard.watched.pop()
        yield from tensors.items()
        module.backward(loss)
    yield from gradients(module, module.backbone.trained_parameters(module.trained_role))


def _iteration(module: RTOModule, dump: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    experience = _experience(dump["experience"])
    if dump["rows"] is None:
        # What the rollout has kept would be taken for granted.
        trajectory = replace(experience.trajectory, logprobs=None, entropies=None, values=None)
        yield from experience_tensors(module.make_experience(trajectory, dump["messages"]), module.source_names)
        return
    shared = module.critic.value_coefficient if module.ppo.has_critic and module.critic.shared else None
    arguments = module.backbone, experience, dump["rows"], module.ppo
    if dump["role"] == "policy":
        temperature = module.rollout_settings.temperature
        metrics = accumulate_policy_gradients(*arguments, temperature, Tensor.backward, shared)
    else:
        metrics = accumulate_value_gradients(*arguments, Tensor.backward, head_only=shared is not None)
    yield from losses(metrics)
    yield from gradients(module, module.backbone.trained_parameters(dump["role"]))


def _experience(fields: dict[str, Any]) -> Experience:
    """From what `asdict` made of it."""
    trajectory = Trajectory(**{**fields["trajectory"], "sequences": Sequences(**fields["trajectory"]["sequences"])})
    return Experience(**{**fields, "trajectory": trajectory, "terms": RewardTerms(**fields["terms"])})
