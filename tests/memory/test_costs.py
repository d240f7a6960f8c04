"""What is communicated and computed, against counters of torch and against counting by hand."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rto_lightning.backbone import LoraSettings, Sequences
from rto_lightning.data import DemonstrationDataModule, PreferenceDataModule, PromptDataModule
from rto_lightning.memory import MemoryPlan, Parallelism, Rates, cost_table, plan_costs, plan_memory, workload_of
from rto_lightning.memory.costs import Computation, Transfer
from rto_lightning.memory.plan import CostPlan, Item, PhasePlan
from rto_lightning.memory.shapes import StageShapes
from rto_lightning.modules.rto_settings import CriticSettings, PPOSettings
from rto_lightning.rollout import RolloutSettings
from tests.models import write_tiny_model
from tests.modules import stages
from tests.roles import save_random_role

PROMPT, RESPONSE, ROWS = 20, 8, 4
LIMITS: dict[str, Any] = {"max_prompt_tokens": PROMPT, "max_response_tokens": RESPONSE, "batch_size": ROWS}
DEMONSTRATIONS = DemonstrationDataModule(train="x", **LIMITS)
PROMPTS = PromptDataModule(train="x", max_prompt_tokens=PROMPT, batch_size=ROWS)
DDP = Parallelism("ddp", 4)


NO_PLAN = MemoryPlan("", "", "", 0, 0, "", (), (), 0, (PhasePlan("rollout", (Item("KV cache", 10**6),)),))


def costs(module: Any, data: Any, parallelism: Parallelism = DDP) -> CostPlan:
    """With a key-value cache of a megabyte, whose true size takes the longest to plan."""
    return plan_costs(workload_of(module, data, parallelism=parallelism), NO_PLAN)


class Products(TorchDispatchMode):
    """Counts the operations of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.operations += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("mode", "checkpointing", "tolerance"),
    # Norms, which are counted, make no products; recomputation leaves the last one of a layer out, and adapters, which
    # are not counted, have 4% of the weights here.
    [("full", False, 0.005), ("full", True, 0.07), ("adapters", False, 0.1)],
)
def test_products_with_weights_are_counted_as_they_are_made(tmp_path, mode, checkpointing, tolerance):
    folder = write_tiny_model(tmp_path / "wide", hidden_size=64, intermediate_size=192)
    module = stages.sft(folder, mode=mode, gradient_checkpointing=checkpointing, lora=LoraSettings(rank=1))
    [planned] = costs(module, DEMONSTRATIONS, Parallelism()).computations
    module.configure_model()
    ids = torch.randint(3, 259, (ROWS, PROMPT + RESPONSE))
    rows = Sequences(ids, torch.ones_like(ids), torch.ones(ROWS, RESPONSE, dtype=torch.bool))
    with Products() as counted, module.backbone.play("policy"):
        module.backbone.token_logprobs("policy", rows)[0].sum().backward()
    assert planned.operations == pytest.approx(counted.operations, rel=tolerance)


@pytest.fixture(scope="module")
def roles(tiny_model, tmp_path_factory) -> dict[tuple[str, str], str]:
    folder = tmp_path_factory.mktemp("roles")
    kinds = [(mode, role) for mode in ("adapters", "full") for role in ("dpo", "reward")]
    return {
        (mode, role): save_random_role(tiny_model, folder / f"{mode}-{role}", role, mode=mode) for mode, role in kinds
    }


def test_adapters_are_summed_once_a_minibatch(tiny_model, roles):
    ppo = PPOSettings(minibatch_size=4, microbatch_size=1, epochs=3)
    module = stages.full_rto(tiny_model, roles, ppo=ppo)
    workload = workload_of(module, PROMPTS, parallelism=DDP)
    plan = plan_memory(workload)
    weights = {item.name: item.bytes for item in plan.weights}
    sent = {(t.phase, t.operation): t.bytes for t in plan_costs(workload, plan).transfers}
    table = sent.pop(("scoring", "all-gather of responses"))
    [trajectory] = [item.bytes for item in plan.phases[1].items if item.name == "trajectory"]
    assert table == trajectory * 3 // 4
    assert sent == {
        (f"update of {role}", "all-reduce of gradients"): 3 * 2 * weights[role] * 3 // 4
        for role in ("policy", "critic")
    }


def test_a_shared_critic_sums_its_head_and_reads_nothing(tiny_model, roles):
    module = stages.full_rto(tiny_model, roles, critic=CriticSettings(shared=True), ppo=PPOSettings(minibatch_size=4))
    shapes = StageShapes(workload_of(module, PROMPTS, parallelism=DDP), None)
    made = costs(module, PROMPTS)
    [summed] = [t.bytes for t in made.transfers if t.phase == "update of policy and critic"]
    trained = [*shapes.parameters("policy"), *shapes.parameters("critic")]
    assert summed == pytest.approx(2 * sum(weight.nbytes for weight in trained) * 3 / 4, abs=2)
    *_, update = made.computations
    alone = stages.full_rto(tiny_model, roles, ppo=PPOSettings(minibatch_size=4))
    assert update.operations == {c.phase: c.operations for c in costs(alone, PROMPTS).computations}["update of policy"]


def test_a_full_policy_is_handed_over_to_vllm_in_32_bits(tiny_model, roles):
    module = stages.full_rto(tiny_model, roles, "full", rollout=RolloutSettings(engine="vllm"))
    shapes = StageShapes(workload_of(module, PROMPTS), None)
    [handed] = [t.bytes for t in costs(module, PROMPTS, Parallelism("fsdp", 4)).transfers if t.phase == "rollout"]
    assert handed == 4 * sum(weight.numel() for weight in shapes.parameters("policy")) * 3 // 4


def test_one_process_communicates_nothing(tiny_model, roles):
    for sharing in ("none", "ddp", "fsdp"):
        assert costs(stages.full_rto(tiny_model, roles), PROMPTS, Parallelism(sharing)).transfers == ()


def test_a_rank_computes_its_share(tiny_model, roles):
    module = stages.full_rto(tiny_model, roles, "full")
    one, four = (costs(module, PROMPTS, Parallelism("ddp", n)).computations for n in (1, 4))
    assert [c.phase for c in one] == ["rollout", "scoring", "update of policy", "update of critic"]
    for whole, share in zip(one, four, strict=True):
        assert whole.operations == 4 * share.operations > 0
    # Each step of decoding reads every weight, however few rows there are.
    assert one[0].read_bytes == four[0].read_bytes > 0


def test_deep_models_follow_from_two_and_three_layers(tmp_path):
    """As from all layers, which the counts of a model of no likeness in its layers come from."""
    folder = write_tiny_model(tmp_path / "deep", num_hidden_layers=6)
    data = PreferenceDataModule(train="x", **LIMITS)
    exact = costs(stages.dpo(folder), data, Parallelism("fsdp", 4))
    shallow = costs(stages.dpo(write_tiny_model(tmp_path / "2", num_hidden_layers=2)), data, Parallelism("fsdp", 4))
    middle = costs(stages.dpo(write_tiny_model(tmp_path / "4", num_hidden_layers=4)), data, Parallelism("fsdp", 4))
    for deep, few, more in zip(exact.transfers, shallow.transfers, middle.transfers, strict=True):
        assert deep.bytes - more.bytes == pytest.approx(more.bytes - few.bytes, abs=4)
    for deep, few, more in zip(exact.computations, shallow.computations, middle.computations, strict=True):
        assert deep.operations - more.operations == more.operations - few.operations > 0


def test_the_table_has_bytes_and_seconds_that_fit_a_terminal():
    plan = CostPlan(
        (
            Transfer("update of policy and critic", "reduce-scatter of gradients", 100 * 2**30),
            Transfer("scoring", "all-gather of responses", 2**20),
        ),
        (Computation("rollout", 10**15, 4 * 10**12), Computation("update of policy and critic", 9 * 10**17)),
    )
    lines = cost_table(plan, Rates(link=25e9)).splitlines()
    assert max(map(len, lines)) <= 80
    rows = {line[:46].strip(): line[46:].split() for line in lines if line}
    assert rows["communication a process and iteration"] == ["bytes", "s", "at", "25", "GB/s"]
    assert rows["reduce-scatter of gradients"] == ["100.00", "GiB", "4.3"]
    assert rows["all-gather of responses"] == ["1.0", "MiB", "under", "0.1"]
    assert rows["all"] == ["100.00", "GiB", "4.3"]
    assert rows["computation a process and iteration"] == ["TFLOP", "s", "at", "400", "TFLOP/s"]
    assert rows["rollout"] == ["1,000", "2.5"]
    assert rows["rollout: reads of decoding, at 2 TB/s"] == ["3725.29", "GiB", "2.0"]
