"""The scalar head of reward and critic roles."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rto_lightning.backbone.adapter_files import read_tensors
from rto_lightning.errors import UserError

HEAD_FILE = "head.safetensors"
"""Its weights in the folder of a saved role."""


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

    def load(self, folder: Path, role: str, needed: bool) -> None:
        """Take the weights over that were saved with a role, if it has any.

        Raises:
            UserError: if it has none and they are needed, or if they are damaged or of another size.
        """
        if (folder / HEAD_FILE).exists():
            weights = read_tensors(folder / HEAD_FILE)
            try:
                self.load_state_dict(weights)
            except RuntimeError as error:
                raise UserError(
                    f"{folder / HEAD_FILE} does not hold the weight (1, {self.in_features}) and bias (1,) of a head on "
                    "this model; train the role again."
                ) from error
        elif needed:
            raise UserError(f"{folder} has no {HEAD_FILE}, so it cannot score as {role}; name a saved reward role.")

    @torch.no_grad()
    def rescale(self, mean: float, std: float) -> None:
        """From now on give (number - mean) / std."""
        self.bias.sub_(mean).div_(std)
        self.weight.div_(std)


def freeze_unused_output_layer(model: PreTrainedModel) -> None:
    """Take the output layer of a model that is read through a scalar head from training, unless it is the embedding.

    No gradient reaches it, and DDP waits for that of every weight that asks for one.
    """
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if output is not None and output.weight is not embedding.weight:
        output.requires_grad_(False)
