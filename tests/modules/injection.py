"""Puts NaN or infinity into a training step of a stage, and undoes a step, which is what leaving it out must equal."""

import copy
import importlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

Inject = Callable[[Any], AbstractContextManager[Any]]
"""Makes of a stage's module a context within which something is not finite."""

score = 0.0
"""What `scores` adds to the first of its scores."""


def scores(prompts: list[Any], responses: list[str]) -> list[float]:
    """A reward function that can be made to fail."""
    values = [sum(ord(character) % 7 for character in response) / 10 for response in responses]
    return [values[0] + score, *values[1:]]


def first_element(tensor: Tensor, value: float) -> Tensor:
    """The tensor with another first element; the gradients of the others stay."""
    first = torch.zeros_like(tensor, dtype=torch.bool)
    first.view(-1)[0] = True
    return torch.where(first, tensor + value, tensor)


def output(method: str, role: str, value: float = math.nan) -> Inject:
    """Into what a method of the backbone says of a role."""

    def inject(module: Any) -> AbstractContextManager[Any]:
        original = getattr(module.backbone, method)

        def read(name: str, *args: Any, **kwargs: Any) -> Any:
            result = original(name, *args, **kwargs)
            if name != role:
                return result
            if isinstance(result, Tensor):
                return first_element(result, value)
            return (first_element(result[0], value), *result[1:])

        return patch.object(module.backbone, method, read)

    return inject


def result_of(function: str, value: float = math.nan) -> Inject:
    """Into what a function returns that a module has imported: `module.path:name`."""
    path, _, name = function.partition(":")

    def inject(module: Any) -> AbstractContextManager[Any]:
        target = importlib.import_module(path)
        original = getattr(target, name)

        def compute(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if isinstance(result, Tensor):
                return first_element(result, value)
            changed = first_element(result[0], value), *result[1:]
            return type(result)(*changed) if hasattr(result, "_fields") else changed

        return patch.object(target, name, compute)

    return inject


def score_of_function(value: float) -> Inject:
    """Into the first score of the reward function `scores`."""
    return lambda module: patch("tests.modules.injection.score", value)


def gradient(role: str, value: float = math.nan) -> Inject:
    """Into the gradient of the last weight of a role."""

    def inject(module: Any) -> AbstractContextManager[Any]:
        stack = ExitStack()
        weight = module.backbone.trained_parameters(role)[-1]
        stack.callback(weight.register_hook(lambda grad: first_element(grad, value)).remove)
        return stack

    return inject


class Fault(Callback):
    """Injects at some steps, and keeps the weights from before the first of them, of all roles or of one."""

    def __init__(self, inject: Inject, *steps: int, role: str | None = None) -> None:
        self.inject, self.steps, self.role = inject, steps, role
        self.stack = ExitStack()
        self.before: list[Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step in self.steps:
            self.before = self.before or weights(pl_module, self.role)
            self.stack.enter_context(self.inject(pl_module))

    def on_train_batch_end(self, *args: Any) -> None:
        self.stack.close()

    def on_exception(self, *args: Any) -> None:
        self.stack.close()


class Undo(Callback):
    """Takes weights and optimizer states back after a step, of all roles or of one."""

    def __init__(self, step: int, role: str | None = None) -> None:
        self.step, self.role = step, role
        self.kept: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            self.kept = [copy.deepcopy(optimizer.state_dict()) for optimizer in self._optimizers(trainer)]
            self.weights = weights(pl_module, self.role)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if self.kept:
            for optimizer, state in zip(self._optimizers(trainer), self.kept, strict=True):
                optimizer.load_state_dict(state)
            with torch.no_grad():
                for weight, before in zip(_trained(pl_module, self.role), self.weights, strict=True):
                    weight.copy_(before)
            self.kept = []

    def _optimizers(self, trainer: Trainer) -> list[torch.optim.Optimizer]:
        return trainer.optimizers if self.role is None else [trainer.optimizers[("policy", "critic").index(self.role)]]


def weights(module: LightningModule, role: str | None = None) -> list[Tensor]:
    """Copies of what a module trains, or of the weights of one of its roles."""
    return [weight.detach().clone() for weight in _trained(module, role)]


def _trained(module: Any, role: str | None) -> list[torch.nn.Parameter]:
    names = [role] if role else list(module.backbone.roles)
    return [weight for name in names for weight in module.backbone.trained_parameters(name)]
