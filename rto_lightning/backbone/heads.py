"""The scalar head of reward and critic roles."""

import torch
from torch import Tensor, nn


class ScalarHead(nn.Linear):
    """One number from a hidden state; it starts as zeros and computes in its own data type, under autocast too.

    Args:
        hidden_size: width H of the hidden states.
        dtype: data type of its weights.
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__(hidden_size, 1, dtype=dtype)

    def reset_parameters(self) -> None:
        """All zeros."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., H) to numbers (...)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.to(self.weight.dtype)).squeeze(-1)

    @torch.no_grad()
    def rescale(self, mean: float, std: float) -> None:
        """From now on give (number - mean) / std."""
        self.bias.sub_(mean).div_(std)
        self.weight.div_(std)
