"""Run by every rank: a 4-bit base that FSDP2 spreads computes what it computed whole.

python -m torch.distributed.run --standalone --nproc_per_node 2 -m tests.distributed.quantized MODEL
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from rto_lightning.backbone import BackboneSettings, PolicyBackbone, Sequences, load_chat_tokenizer
from rto_lightning.backbone.sharding import Sharding
from rto_lightning.rollout.sampling import SeededSampling
from tests.models import LORA, randomize

PROMPTS = torch.tensor([[1, 5, 6, 7], [1, 8, 9, 10]])
SEQUENCES = Sequences.from_lists([[5, 6, 7], [8, 9]], [[10, 11], [12, 13, 2]], 2)


def compute(backbone: PolicyBackbone) -> list[torch.Tensor]:
    """Responses, log-probabilities after that rollout, and the gradient of every adapter weight."""
    for weight in backbone.trained_parameters("policy"):
        weight.grad = None
    drawn = backbone.decode("policy", PROMPTS, torch.ones_like(PROMPTS), SeededSampling([1, 2], 6, 1.0), 6).tokens
    logprobs, _ = backbone.token_logprobs("policy", SEQUENCES)
    logprobs.sum().backward()
    gradients = [weight.grad for weight in backbone.trained_parameters("policy")]
    assert all(gradient is not None for gradient in gradients)
    return [drawn, logprobs.detach(), *(gradient.clone() for gradient in gradients if gradient is not None)]


def main(model: str) -> None:
    """Compare whole and spread."""
    dist.init_process_group("gloo")
    settings = BackboneSettings(model, quantization="nf4", lora=LORA)
    backbone = PolicyBackbone(settings, load_chat_tokenizer(settings))
    backbone.add_role("policy", trainable=True)
    torch.manual_seed(0)
    randomize(backbone.trained_parameters("policy"))
    whole = compute(backbone)
    assert all(gradient.abs().max() > 0 for gradient in whole[2:])
    packed = {name: weight.numel() for name, weight in backbone.named_parameters() if weight.dtype == torch.uint8}
    assert packed

    backbone.shard(Sharding(init_device_mesh("cpu", (dist.get_world_size(),))))
    for name, weight in backbone.named_parameters():
        if name in packed:
            assert isinstance(weight, DTensor)
            assert weight.to_local().numel() == packed[name] // dist.get_world_size()
    assert all(torch.equal(a, b) for a, b in zip(whole, compute(backbone), strict=True))
    print(f"{Path(model).name}: as before")


if __name__ == "__main__":
    main(sys.argv[1])
