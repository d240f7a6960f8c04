"""Learning-rate schedules that torch does not have in one class."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class CosineWithWarmup(LambdaLR):
    """Linear warm-up, then a cosine down to a floor.

    Args:
        optimizer: the optimizer whose learning rate is scheduled.
        total_steps: length of the schedule, in iterations for RTO and optimizer steps elsewhere; the floor afterwards.
        warmup: share of `total_steps` spent warming up.
        floor: last learning rate as a share of the highest.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup: float = 0.03, floor: float = 0.1) -> None:
        warmup_steps = max(1, round(warmup * total_steps))

        def factor(step: int) -> float:
            if step < min(warmup_steps, total_steps):
                return (step + 1) / warmup_steps
            if step >= total_steps:
                return floor
            progress = (step - warmup_steps) / (total_steps - warmup_steps)
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

        super().__init__(optimizer, factor)
