import copy
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from rto_lightning.data import PreferenceDataModule, PromptDataModule
from rto_lightning.memory import (
    Change,
    MemoryPlan,
    Parallelism,
    plan_memory,
    plan_table,
    proposed_changes,
    warning,
    workload_of,
)
from rto_lightning.memory.plan import Item, PhasePlan
from rto_lightning.modules.rto_settings import CriticSettings
from tests.modules import stages

GIB = 2**30
PLAN = MemoryPlan(
    stage="rto",
    model="owner/model",
    precision="bf16-mixed",
    prompt_tokens=100,
    response_tokens=50,
    batch="16 responses an iteration",
    weights=(Item("base", 5 * GIB), Item("policy", GIB // 10)),
    optimizers=(Item("policy", GIB // 5),),
    process=GIB // 2,
    phases=(
        PhasePlan("rollout", (Item("KV cache", 2 * GIB), Item("activations", GIB // 4))),
        PhasePlan("update of policy", (Item("gradients", GIB // 10), Item("activations", 3 * GIB))),
    ),
)
ALL = Change("all of these", 2 * GIB)


def test_the_peak_is_what_is_resident_and_the_largest_phase():
    assert PLAN.resident == sum((5 * GIB, GIB // 10, GIB // 5, GIB // 2))
    assert PLAN.peak_phase.name == "update of policy"
    assert PLAN.peak == PLAN.resident + GIB // 10 + 3 * GIB
    contents = PLAN.as_dict()
    assert contents["peak"] == PLAN.peak and contents["weights"] == {"base": 5 * GIB, "policy": GIB // 10}
    assert contents["phases"][0] == {
        "name": "rollout",
        "bytes": 2 * GIB + GIB // 4,
        "items": {"KV cache": 2 * GIB, "activations": GIB // 4},
    }


def test_the_table_fits_a_terminal_and_names_every_part():
    table = plan_table(PLAN, "cpu", 4 * GIB, [Change("model.backbone.gradient_checkpointing true", 3 * GIB), ALL])
    lines = table.splitlines()
    assert max(map(len, lines)) <= 80
    rows = {line[:66].strip(): line[66:].strip() for line in lines if len(line) == 78}
    assert rows["weights"] == "5.10 GiB" and rows["resident"] == "5.80 GiB"
    assert rows["+ rollout"] == "2.25 GiB" and rows["peak (resident + update of policy)"] == "8.90 GiB"
    assert rows["available"] == "4.00 GiB" and rows["all of these"] == "2.00 GiB"
    assert "no GPU here" in plan_table(PLAN, "cuda", None)


def test_the_warning_is_one_sentence_with_what_to_change():
    changes = [Change("a.b 1", 3 * GIB), Change("c.d true", 5 * GIB), ALL]
    assert warning(PLAN, 4 * GIB, changes) == (
        "the memory plan takes 8.90 GiB, but 4.00 GiB are available; set a.b 1 (3.00 GiB). `rto-lightning plan` shows "
        "where it goes."
    )
    assert "set a.b 1 (3.00 GiB), or c.d true (5.00 GiB); all together 2.00 GiB." in warning(PLAN, GIB, changes)
    assert warning(PLAN, GIB, []).endswith("use a smaller model or a larger device.")


@given(sizes=st.lists(st.integers(0, 10**12), min_size=4, max_size=4))
def test_the_parts_of_the_table_add_up(sizes):
    phases = tuple(PhasePlan(f"phase {size}", (Item("activations", size),)) for size in sizes)
    plan = replace(PLAN, phases=phases)
    assert plan.peak == plan.resident + max(sizes)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory) -> str:
    """Only a configuration: wide enough that each setting matters, with a vocabulary that fills a chunk of logits."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    config = LlamaConfig(
        vocab_size=4000, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8
    )
    config.save_pretrained(folder)
    return str(folder)


SHORT: dict[str, Any] = {"max_prompt_tokens": 8, "max_response_tokens": 8}
PAIRS = PreferenceDataModule(train="x", max_prompt_tokens=200, max_response_tokens=200, batch_size=4)


def test_each_change_takes_less_and_what_the_plan_with_it_says(wide_model):
    module = stages.dpo(wide_model, mode="full")
    plan = plan_memory(workload_of(module, PAIRS))
    changes = proposed_changes(plan, module, PAIRS, "32-true")
    *alone, together = [change.peak for change in changes]
    assert alone == sorted(alone) and alone[-1] < plan.peak and together <= alone[0]
    assert {change.setting for change in changes} >= {
        "model.backbone.mode adapters",
        "model.backbone.mode adapters and quantization nf4",
        "data.batch_size 1 with trainer.accumulate_grad_batches times 4",
        "model.optimizer AdamW8bit",
        "all of these",
    }
    assert (module.settings.mode, PAIRS.batch_size) == ("full", 4)  # the stage itself is as it was
    small = copy.copy(PAIRS)
    small.batch_size = 1
    expected = plan_memory(workload_of(module, small)).peak
    assert Change("data.batch_size 1 with trainer.accumulate_grad_batches times 4", expected) in changes


def test_sharing_is_proposed_to_processes_that_copy(tiny_model):
    module, data = stages.dpo(tiny_model, mode="full"), PreferenceDataModule(train="x", batch_size=4, **SHORT)

    def proposed(parallelism: Parallelism) -> tuple[int, dict[str, int]]:
        plan = plan_memory(workload_of(module, data, parallelism=parallelism))
        changes = proposed_changes(plan, module, data, "32-true", False, parallelism)
        return plan.peak, {change.setting: change.peak for change in changes}

    copied, changes = proposed(Parallelism("ddp", 4))
    shared, others = proposed(Parallelism("fsdp", 4))
    assert changes["trainer.strategy fsdp"] == shared < copied
    assert not any(setting.startswith("data.batch_size") for setting in changes)  # each has one pair already
    assert "model.backbone.mode adapters" in others  # but nothing that shares of weights do not go with
    assert others.keys().isdisjoint({"trainer.strategy fsdp", "model.optimizer AdamW8bit"})


def test_copies_hold_the_buckets_in_which_gradients_are_summed(tiny_model):
    """DDP has one for every gradient; RTO, which sums by itself, copies a bucket at a time besides."""
    module = stages.rto(tiny_model, backbone={"mode": "full"}, critic=CriticSettings(shared=True))
    data = PromptDataModule(train="x", max_prompt_tokens=8, batch_size=4)
    one, four = (
        plan_memory(workload_of(module, data, parallelism=parallelism))
        for parallelism in (Parallelism(), Parallelism("ddp", 4))
    )
    gradients = sum(item.bytes for item in one.phases[-1].items if item.name == "gradients")
    assert (one.buckets, four.buckets) == (0, gradients)
    assert four.resident - one.resident == gradients
    assert "gradient buckets of DDP" in plan_table(four, "cuda", None)
    lines = plan_table(four, "cuda", None).splitlines()
    assert lines[1] == "one of 4 processes, ddp; rows are those of one process"
