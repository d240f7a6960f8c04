"""What is planned of sharded models against FSDP2 itself, in a process group whose other ranks are not there."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from rto_lightning.backbone import PolicyBackbone, Sequences
from rto_lightning.backbone.decoding import Draw
from rto_lightning.backbone.sharding import Sharding
from rto_lightning.data import DemonstrationDataModule, PreferenceDataModule, PromptDataModule
from rto_lightning.memory import Parallelism, plan_memory, workload_of
from rto_lightning.memory.costs import model_sizes, transfers
from rto_lightning.memory.dry_run import Quantity, dry_run
from rto_lightning.memory.live_bytes import tensor_bytes
from rto_lightning.memory.shapes import StageShapes, state_tensors
from rto_lightning.memory.sharding import gathered_at_a_time, held_of_base, held_of_role, model_groups
from tests.models import write_tiny_model
from tests.modules import stages

PROCESSES = 4
SHARDED = Parallelism("fsdp", PROCESSES)
PROMPT, RESPONSE = 20, 8
LIMITS: dict[str, Any] = {"max_prompt_tokens": PROMPT, "max_response_tokens": RESPONSE}
PAIRS = PreferenceDataModule(train="x", batch_size=PROCESSES, **LIMITS)
DEMONSTRATIONS = DemonstrationDataModule(train="x", batch_size=PROCESSES, **LIMITS)


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory):
    """Three layers, and rows that four processes do not share evenly; the output layer is no copy of the embedding."""
    folder = tmp_path_factory.mktemp("deep")
    return write_tiny_model(folder, num_hidden_layers=3, intermediate_size=90, tie_word_embeddings=False)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(request, deep_model, tiny_model):
    return tiny_model if request.param else deep_model


@contextmanager
def first_rank(processes: int = PROCESSES) -> Iterator[Any]:
    """Be the first of some processes whose messages nobody answers; yields their mesh."""
    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (processes,))
    finally:
        dist.destroy_process_group()


def sharded_backbone(module: Any, mesh: Any, dtype: torch.dtype | None = None) -> PolicyBackbone:
    module.configure_model()
    module.backbone.shard(Sharding(mesh, dtype))
    return module.backbone


def local_bytes(weights: Any) -> int:
    return tensor_bytes(weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights)


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_a_process_holds_its_share_of_a_trained_model(model, processes):
    module = stages.reward_model(model, mode="full")
    data = PreferenceDataModule(train="x", batch_size=processes, **LIMITS)
    shapes = StageShapes(workload_of(module, data, parallelism=replace(SHARDED, processes=processes)), None)
    with first_rank(processes) as mesh:
        backbone = sharded_backbone(module, mesh)
        assert held_of_role(shapes, "reward").device == local_bytes(backbone.trained_parameters("reward"))


def test_a_process_holds_its_share_of_a_frozen_base_and_whole_adapters(model):
    module = stages.dpo(model)
    shapes = StageShapes(workload_of(module, PAIRS, parallelism=SHARDED), None)
    with first_rank() as mesh:
        backbone = sharded_backbone(module, mesh)
        adapter = backbone.trained_parameters("policy")
        known = {id(weight) for weight in adapter}
        base = [weight for weight in backbone.models["base"].parameters() if id(weight) not in known]
        buffers = tensor_bytes(backbone.models["base"].buffers())
        assert held_of_base(shapes).device == local_bytes(base) + buffers
        assert held_of_role(shapes, "policy").device == tensor_bytes(adapter)


def test_the_scales_of_4_bit_weights_are_whole(deep_model):
    module = stages.dpo(deep_model, quantization="nf4")
    shapes = StageShapes(workload_of(module, PAIRS, parallelism=SHARDED), None)
    with first_rank() as mesh:
        backbone = sharded_backbone(module, mesh)
        scales = [tensor for layer in backbone.models["base"].modules() for tensor in state_tensors(scales_of(layer))]
        known = {id(weight) for weight in backbone.trained_parameters("policy")}
        base = [weight for weight in backbone.models["base"].parameters() if id(weight) not in known]
        whole = tensor_bytes([*backbone.models["base"].buffers(), *scales])
        assert scales and held_of_base(shapes).device == local_bytes(base) + whole


def scales_of(layer: Any) -> Any:
    return getattr(layer, "quant_state", None) or getattr(getattr(layer, "weight", None), "quant_state", None)


class Collectives(TorchDispatchMode):
    """Counts the bytes of what collective operations take and give, and the weights that are whole at a time."""

    def __init__(self, backbone: PolicyBackbone) -> None:
        super().__init__()
        self.gathered = self.scattered = self.most_whole = 0
        self._groups = [
            group
            for module in backbone.modules()
            if isinstance(module, FSDPModule)
            for group in module._get_fsdp_state()._fsdp_param_groups
        ]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_allgather_base_" in func.name():
            self.gathered += args[0].nbytes
        elif "_reduce_scatter_base_" in func.name():
            self.scattered += args[1].nbytes
        result = func(*args, **(kwargs or {}))
        whole = [
            output.untyped_storage().nbytes()
            for group in self._groups
            for weight in group.fsdp_params
            for output in getattr(weight, "all_gather_outputs", ())
        ]
        ahead = [group._all_gather_result.all_gather_output for group in self._groups if group._all_gather_result]
        self.most_whole = max(self.most_whole, sum(whole) + sum(output.nbytes for output in ahead))
        return result


def sequences(rows: int) -> Sequences:
    ids = torch.randint(3, 259, (rows, PROMPT + RESPONSE))
    return Sequences(ids, torch.ones_like(ids), torch.ones(rows, RESPONSE, dtype=torch.bool))


def received(workload: Any) -> dict[str, int]:
    """Bytes by operation."""
    sizes = model_sizes(StageShapes(workload, None), workload)
    bytes_of: dict[str, int] = {}
    for transfer in transfers(workload, sizes, 0):
        bytes_of[transfer.operation] = bytes_of.get(transfer.operation, 0) + transfer.bytes
    return bytes_of


@pytest.mark.parametrize(("mode", "checkpointing"), [("adapters", False), ("full", False), ("full", True)])
def test_a_batch_gathers_and_scatters_what_is_planned(deep_model, mode, checkpointing):
    module = stages.dpo(deep_model, mode=mode, gradient_checkpointing=checkpointing)
    workload = workload_of(module, PAIRS, parallelism=SHARDED)
    with first_rank() as mesh:
        backbone = sharded_backbone(module, mesh)
        with Collectives(backbone) as counted:
            with torch.no_grad():
                backbone.token_logprobs("reference", sequences(2))
            with backbone.play("policy"):
                backbone.token_logprobs("policy", sequences(2))[0].sum().backward()
    share = (PROCESSES - 1) / PROCESSES
    planned = received(workload)
    # FSDP pads rows that the processes do not share evenly.
    assert planned["all-gather of weights"] == pytest.approx(share * counted.gathered, rel=0.05)
    assert planned.get("reduce-scatter of gradients", 0) == pytest.approx(share * counted.scattered, rel=0.05)
    assert ("all-reduce of gradients" in planned) == (mode == "adapters")


def test_two_layers_and_the_rest_are_whole_at_a_time(deep_model):
    module = stages.sft(deep_model, mode="full")
    shapes = StageShapes(workload_of(module, DEMONSTRATIONS, parallelism=SHARDED), None)
    with first_rank() as mesh:
        backbone = sharded_backbone(module, mesh)
        with Collectives(backbone) as counted, backbone.play("policy"):
            backbone.token_logprobs("policy", sequences(2))[0].sum().backward()
    planned = gathered_at_a_time(model_groups(shapes, "policy"), False)
    assert planned == pytest.approx(counted.most_whole, rel=0.05)


@pytest.mark.parametrize("gathers", [True, False])
def test_a_rollout_gathers_what_is_planned(deep_model, gathers):
    """Where nobody ends early: the whole policy once, or every layer for each token."""
    data = PromptDataModule(train="x", max_prompt_tokens=PROMPT, batch_size=2 * PROCESSES)
    module = stages.rto(deep_model, backbone={"mode": "full"})
    workload = workload_of(module, data, parallelism=replace(SHARDED, gathers_for_rollout=gathers))
    [policy] = [passes for passes in workload.passes if passes.phase == "rollout"]
    assert (policy.rows, policy.batches, policy.new_tokens) == (2, 1, module.rollout_settings.max_new_tokens)

    def draw(logits: torch.Tensor, rows: torch.Tensor, step: int) -> Draw:
        return Draw(torch.full((len(logits),), 5))

    with first_rank() as mesh:
        backbone = sharded_backbone(module, mesh)
        ids = torch.randint(3, 259, (2, PROMPT))
        with Collectives(backbone) as counted:
            tokens = policy.new_tokens
            backbone.decode("policy", ids, torch.ones_like(ids), draw, tokens, gather_weights=gathers)
    planned = received(replace(workload, passes=(policy,)))
    assert planned == {"all-gather of weights": pytest.approx((PROCESSES - 1) / PROCESSES * counted.gathered, rel=0.05)}


def test_shares_make_a_plan_smaller_by_their_number(deep_model):
    """Weights, gradients and optimizer states; what is gathered and computed does not depend on the processes."""
    module = stages.sft(deep_model, mode="full")
    workload = workload_of(module, DEMONSTRATIONS, parallelism=Parallelism("fsdp", 1))
    whole, shared = dry_run(workload, None, False), dry_run(replace(workload, parallelism=SHARDED), None, False)
    for kind in ("weights", "gradients", "optimizer"):
        assert shared[Quantity(kind, "policy")] == pytest.approx(whole[Quantity(kind, "policy")] / PROCESSES, rel=0.05)
    part = workload.phases[0].parts[0]
    for kind in ("activations", "gathered weights", "gathered gradients"):
        assert shared[Quantity(kind, "policy", part)] == whole[Quantity(kind, "policy", part)] > 0


def test_offloaded_shares_are_on_the_host(deep_model):
    module = stages.sft(deep_model, mode="full")
    workload = workload_of(module, DEMONSTRATIONS, parallelism=SHARDED)
    held = plan_memory(workload)
    offloaded = plan_memory(replace(workload, parallelism=replace(SHARDED, offloads=True)))
    gradients = sum(item.bytes for item in held.phases[0].items if item.name == "gradients")
    resident = sum(item.bytes for item in (*held.weights, *held.optimizers))
    assert held.host == 0 and offloaded.host == resident + gradients and offloaded.resident == 0
    assert offloaded.peak < held.peak


def test_mixed_precision_gathers_in_16_bits(deep_model):
    module = stages.sft(deep_model, mode="full")
    workloads = [workload_of(module, DEMONSTRATIONS, p, SHARDED) for p in ("32-true", "bf16-mixed")]
    part = workloads[0].phases[0].parts[0]
    whole, half = (dry_run(w, None, False)[Quantity("gathered weights", "policy", part)] for w in workloads)
    assert whole == 2 * half
    adapters = workload_of(stages.sft(deep_model), DEMONSTRATIONS, "bf16-mixed", SHARDED)
    assert dry_run(adapters, None, False)[Quantity("gathered weights", "policy", part)] == whole
