"""The same roles on a device and on the CPU: how far results are apart.

The reference is the CPU in float32. On the device, float32 (without TF32) has to agree with it; bfloat16 and NF4 are
reported, NF4 also against NF4 on the CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rto_lightning.algorithms import policy_loss, value_loss
from rto_lightning.backbone import BackboneSettings, PolicyBackbone, Sequences, load_chat_tokenizer
from rto_lightning.modules import RTOModule
from rto_lightning.modules.rto_settings import PPOSettings
from rto_lightning.rollout import RolloutSettings, Trajectory, TransformersEngine
from tests.gpu.shapes import NumericsShape
from tests.gpu.training import train
from tests.models import LORA, write_tiny_model
from tests.roles import save_random_role

ROLES = {"policy": "policy", "critic": "reward", "dpo": "dpo", "reward": "reward"}
"""The roles with an adapter, and what each is saved as."""
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "nf4 float32": {"dtype": "float32", "quantization": "nf4"},
    "bfloat16": {"dtype": "bfloat16"},
    "nf4 bfloat16": {"dtype": "bfloat16", "quantization": "nf4"},
}
"""How the base is held on the device."""
LIMITS = {"logprobs": 1e-4, "values": 1e-4, "scores": 1e-4, "gradient": 1e-3, "update": 1e-3, "metrics": 1e-3}
"""How far float32 on the device may be from float32 on the CPU; see `deviation` and `one_iteration`."""


@dataclass(frozen=True)
class Inputs:
    """What is read, and the targets of the losses."""

    sequences: Sequences
    """B prompts with responses, of different lengths."""
    truncated: Tensor
    """(B,) bool, all false."""
    old_logprobs: Tensor
    """What the policy's ratio is taken against, (B, T)."""
    advantages: Tensor
    """(B, T)."""
    returns: Tensor
    """(B, T)."""

    def to(self, device: torch.device) -> "Inputs":
        """The same on another device."""
        rest = (self.truncated, self.old_logprobs, self.advantages, self.returns)
        return Inputs(self.sequences.to(device), *(tensor.to(device) for tensor in rest))


def compare(
    device: torch.device, shape: NumericsShape, folder: Path, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Compare the device with the CPU on every model and variant; a record for each, which is reported as it comes.

    Args:
        device: what is compared; the CPU itself for a trial.
        shape: models and lengths.
        folder: for models and roles, empty.
        report: shows a line.
    """
    torch.set_float32_matmul_precision("highest")
    records = []
    report(header())
    for name, changes in shape.models.items():
        model = write_tiny_model(
            folder / name, max_position_embeddings=512, initializer_range=0.05, tie_word_embeddings=False, **changes
        )
        folders = {role: save_random_role(model, folder / f"{name}_{role}", kind) for role, kind in ROLES.items()}
        inputs = make_inputs(shape)
        cpu = torch.device("cpu")
        reference = load(model, folders, cpu, "float32")
        inputs = replace(inputs, old_logprobs=read(reference, inputs)["policy logprobs"])
        expected = results(reference, inputs, shape)
        on_cpu = {"nf4 float32": results(load(model, folders, cpu, "nf4 float32"), inputs, shape)}
        iteration = one_iteration(model, folders, cpu, inputs, shape, folder / f"{name}_cpu")
        for variant in VARIANTS:
            found = results(load(model, folders, device, variant), inputs, shape)
            record = {"model": name, "variant": variant, "against": "float32", **deviation(found, expected)}
            if variant == "float32":
                path = folder / f"{name}_device"
                record |= compare_iterations(one_iteration(model, folders, device, inputs, shape, path), iteration)
            records.append(record)
            report(row(record))
            if variant in on_cpu:
                records.append(
                    {"model": name, "variant": variant, "against": variant, **deviation(found, on_cpu[variant])}
                )
                report(row(records[-1]))
    return records


def load(model: Path, folders: dict[str, str], device: torch.device, variant: str) -> PolicyBackbone:
    """A backbone with five roles."""
    settings = BackboneSettings(str(model), lora=LORA, logprob_chunk_tokens=64, **VARIANTS[variant])
    backbone = PolicyBackbone(settings, load_chat_tokenizer(settings), device)
    backbone.add_role("reference")
    for role in ROLES:
        trainable, head = role in ("policy", "critic"), ROLES[role] == "reward"
        backbone.add_role(role, folders[role], trainable=trainable, scalar_head=head)
    return backbone.to(device)


def make_inputs(shape: NumericsShape) -> Inputs:
    """Random samples of different lengths; the old log-probabilities are still to be set."""
    generator = torch.Generator().manual_seed(0)

    def rows(longest: int) -> list[list[int]]:
        lengths = [max(1, longest - 3 * number % longest) for number in range(shape.prompts)]
        return [torch.randint(3, 259, (length,), generator=generator).tolist() for length in lengths]

    sequences = Sequences.from_lists(rows(shape.prompt_tokens), rows(shape.response_tokens), pad_id=2)
    size = sequences.response_mask.shape
    advantages, returns = (torch.randn(size, generator=generator) * sequences.response_mask for _ in range(2))
    return Inputs(sequences, torch.zeros(size[0], dtype=torch.bool), torch.zeros(size), advantages, returns)


@torch.no_grad()
def read(backbone: PolicyBackbone, inputs: Inputs) -> dict[str, Tensor]:
    """What every role says, on the CPU."""
    sequences = inputs.sequences.to(next(backbone.parameters()).device)
    result = {f"{r} logprobs": backbone.token_logprobs(r, sequences)[0] for r in ("policy", "reference", "dpo")}
    result["critic values"] = backbone.token_values("critic", sequences)
    result["reward scores"] = backbone.sequence_scores("reward", sequences)
    return {name: tensor.float().cpu() for name, tensor in result.items()}


def results(backbone: PolicyBackbone, inputs: Inputs, shape: NumericsShape) -> dict[str, Tensor]:
    """What every role says, the gradients of both losses, and answers to the prompts; on the CPU."""
    result = read(backbone, inputs)
    device = next(backbone.parameters()).device
    there = inputs.to(device)
    sequences, mask = there.sequences, there.sequences.response_mask
    with backbone.play("policy"):
        logprobs, _ = backbone.token_logprobs("policy", sequences)
        policy_loss(logprobs, there.old_logprobs, there.advantages, mask, 0.2)[0].backward()
    with backbone.play("critic"):
        values = backbone.token_values("critic", sequences)
        value_loss(values, values.detach(), there.returns, mask, 0.2)[0].backward()
    for role in ("policy", "critic"):
        gradients = [p.grad.flatten() for p in backbone.trained_parameters(role) if p.grad is not None]
        assert len(gradients) == len(backbone.trained_parameters(role)), f"{role} has weights without a gradient"
        result[f"{role} gradient"] = torch.cat(gradients).float().cpu()
    backbone.zero_grad()
    prompts = slice(0, sequences.prompt_width)
    for temperature, name in ((0.0, "greedy tokens"), (1.0, "sampled tokens")):
        settings = RolloutSettings(max_new_tokens=shape.response_tokens, temperature=temperature)
        engine = TransformersEngine(backbone, settings)
        ids, attention = sequences.input_ids[:, prompts], sequences.attention_mask[:, prompts]
        answers = engine.rollout("policy", ids, attention, list(range(len(ids)))).sequences
        tokens = answers.response_ids.masked_fill(~answers.response_mask, -1).cpu()
        result[name] = torch.nn.functional.pad(tokens, (0, shape.response_tokens - tokens.shape[1]), value=-1)
    return result


def deviation(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Any]:
    """How far two results are apart.

    Log-probabilities (nats), values and scores: the largest absolute difference, and for log-probabilities the mean
    over tokens. Gradients: norm of the difference over the norm. Tokens: share of responses that are the same.
    """
    result: dict[str, Any] = {"logprobs": 0.0, "logprobs_mean": 0.0, "values": 0.0, "scores": 0.0, "gradient": 0.0}
    for name, tensor in found.items():
        what = name.split()[1]
        difference = (tensor - expected[name]).abs().float()
        if what == "tokens":
            result[name.replace(" ", "_")] = float((difference.sum(1) == 0).float().mean())
        elif what == "gradient":
            result[what] = max(result[what], float(difference.norm() / expected[name].norm()))
        else:
            result[what] = max(result[what], float(difference.max()))
            if what == "logprobs":
                count = int((expected[name] != 0).sum())
                result["logprobs_mean"] = max(result["logprobs_mean"], float(difference.sum()) / count)
    return result


class ReplayedRTO(RTOModule):
    """RTO whose rollout is given."""

    replayed: Trajectory

    def rollout(self, *arguments: Any, **options: Any) -> Trajectory:
        """The given trajectory."""
        return Trajectory(self.replayed.sequences.to(self.device), self.replayed.truncated.to(self.device))


def one_iteration(
    model: Path, folders: dict[str, str], device: torch.device, inputs: Inputs, shape: NumericsShape, folder: Path
) -> tuple[dict[str, float], Tensor]:
    """Score and update by the trainer on a given trajectory: what is logged, and how far the weights moved, (N,)."""
    module = ReplayedRTO(
        BackboneSettings(str(model), lora=LORA),
        trained=folders["policy"],
        dpo=folders["dpo"],
        reward=folders["reward"],
        rollout=RolloutSettings(max_new_tokens=shape.response_tokens),
        ppo=PPOSettings(epochs=2, microbatch_size=2),
        policy_optimizer=_sgd,
        critic_optimizer=_sgd,
        seed=1,
    )
    module.replayed = Trajectory(inputs.sequences, inputs.truncated)
    started: list[Tensor] = []
    metrics = train(module, device, inputs.sequences, folder, before=lambda: started.append(_trained_weights(module)))
    return metrics, _trained_weights(module) - started[0]


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    """Steps in proportion to the gradient: Adam's first step is its sign, which rounding flips where it is near 0."""
    return torch.optim.SGD(parameters, lr=0.1)


def _trained_weights(module: RTOModule) -> Tensor:
    weights = [p for role in ("policy", "critic") for p in module.backbone.trained_parameters(role)]
    return torch.cat([weight.detach().flatten().cpu() for weight in weights])


def compare_iterations(
    found: tuple[dict[str, float], Tensor], expected: tuple[dict[str, float], Tensor]
) -> dict[str, float]:
    """Largest difference of a logged metric, of its size or of 1, and the update's norm of the difference over norm."""
    names = [name for name in expected[0] if "second" not in name]
    assert names and found[0].keys() == expected[0].keys()
    apart = [abs(found[0][name] - expected[0][name]) / max(1.0, abs(expected[0][name])) for name in names]
    return {"metrics": max(apart), "update": float((found[1] - expected[1]).norm() / expected[1].norm())}


def failures(records: list[dict[str, Any]]) -> list[str]:
    """What is further apart than it may be: float32 against float32 only, whose answers have to be the same too."""
    found = []
    for record in records:
        if record["variant"] != "float32":
            continue
        apart = [key for key in LIMITS if not record[key] < LIMITS[key]]
        found += [f"{record['model']}: {key} off by {record[key]:.1e}" for key in apart]
        if record["greedy_tokens"] != 1:
            found.append(f"{record['model']}: {1 - record['greedy_tokens']:.0%} of greedy responses differ")
    return found


# Text -------------------------------------------------------------------------------------------------------------

COLUMNS = ("logprobs", "logprobs_mean", "values", "scores", "gradient", "metrics", "update")


def header() -> str:
    """The head of the table."""
    names = " ".join(f"{name.replace('logprobs_mean', 'mean'):>8}" for name in COLUMNS)
    return f"{'model':<6} {'on the device':<13} {'on the CPU':<12} {names} {'greedy':>7} {'sampled':>7}"


def row(record: dict[str, Any]) -> str:
    """A record as a row of the table."""
    numbers = " ".join(f"{record[name]:>8.1e}" if name in record else " " * 8 for name in COLUMNS)
    same = " ".join(f"{record[name]:>7.0%}" for name in ("greedy_tokens", "sampled_tokens"))
    return f"{record['model']:<6} {record['variant']:<13} {record['against']:<12} {numbers} {same}"
