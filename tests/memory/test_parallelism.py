from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from rto_lightning.data import PreferenceDataModule, PromptDataModule
from rto_lightning.errors import UserError
from rto_lightning.memory import Parallelism, planned_parallelism, running_parallelism, workload_of
from rto_lightning.modules.rto_settings import PPOSettings
from rto_lightning.rollout import RolloutSettings
from rto_lightning.strategies import FullyShardedStrategy
from tests.modules import stages

SHARDED_CLASS = "rto_lightning.strategies.FullyShardedStrategy"


def settings(**changes: Any) -> Any:
    return SimpleNamespace(**{"strategy": "auto", "devices": 1, "num_nodes": 1, "accelerator": "cpu", **changes})


def stage(**changes: Any) -> Any:
    return SimpleNamespace(rollout_settings=RolloutSettings(**changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Parallelism()),
        ({"devices": "auto"}, Parallelism()),
        ({"devices": 4}, Parallelism("ddp", 4)),
        ({"devices": [0, 2], "num_nodes": 3}, Parallelism("ddp", 6, 3)),
        ({"devices": "0,1", "strategy": "ddp_find_unused_parameters_true"}, Parallelism("ddp", 2)),
        ({"devices": "8", "strategy": "fsdp", "num_nodes": 2}, Parallelism("fsdp", 16, 2)),
        ({"devices": 2, "strategy": "fsdp_offload"}, Parallelism("fsdp", 2, offloads=True)),
        ({"strategy": SimpleNamespace(class_path=SHARDED_CLASS, init_args={})}, Parallelism("fsdp")),
        (
            {"devices": 2, "strategy": SimpleNamespace(class_path=SHARDED_CLASS, init_args={"cpu_offload": True})},
            Parallelism("fsdp", 2, offloads=True),
        ),
        ({"strategy": SimpleNamespace(class_path="lightning.pytorch.strategies.DDPStrategy")}, Parallelism("ddp")),
    ],
)
def test_the_trainers_settings_say_how_a_stage_is_spread(changes, expected):
    assert planned_parallelism(settings(**changes), stage()) == expected


def test_more_processes_can_be_planned_than_are_there():
    assert planned_parallelism(settings(strategy="fsdp"), stage(), 64) == Parallelism("fsdp", 64)


def test_a_stage_says_whether_the_policy_is_gathered_for_a_rollout():
    planned = planned_parallelism(settings(strategy="fsdp"), stage(gather_weights=False), 2)
    assert planned == Parallelism("fsdp", 2, gathers_for_rollout=False)


@pytest.mark.parametrize(
    ("changes", "processes", "words"),
    [
        ({"strategy": "deepspeed"}, 2, "set it to auto"),
        (
            {"strategy": SimpleNamespace(class_path="lightning.pytorch.strategies.FSDPStrategy")},
            2,
            "the strategy FSDPStrategy does not run the stages here",
        ),
        ({"strategy": SimpleNamespace(class_path="nowhere.Strategy")}, 2, "cannot be imported"),
        ({"num_nodes": 4}, 6, "6 processes do not spread over 4 node"),
        ({}, 0, "0 processes do not spread"),
    ],
)
def test_what_no_stage_runs_on_is_refused(changes, processes, words):
    with pytest.raises(UserError, match=words):
        planned_parallelism(settings(**changes), stage(), processes)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (SingleDeviceStrategy("cpu"), Parallelism()),
        (DDPStrategy(), Parallelism("ddp", 4, 2)),
        (FullyShardedStrategy(cpu_offload=True), Parallelism("fsdp", 4, 2, offloads=True)),
    ],
    ids=["one", "ddp", "fsdp"],
)
def test_a_trainer_at_work_says_the_same(strategy, expected):
    trainer = SimpleNamespace(strategy=strategy, world_size=expected.processes, num_nodes=expected.nodes)
    assert running_parallelism(trainer, stage()) == expected


@given(processes=st.integers(1, 64), share=st.integers(1, 100))
def test_every_process_takes_the_same_number_of_rows(processes, share):
    parallelism = Parallelism("ddp", processes)
    assert parallelism.share(processes * share, "rows") == share
    if processes > 1:
        with pytest.raises(UserError, match=f"rows {processes * share + 1} counts rows over all devices"):
            parallelism.share(processes * share + 1, "rows")


def test_a_process_has_its_share_of_a_batch(tiny_model):
    data = PreferenceDataModule(train="x", max_prompt_tokens=20, batch_size=12, eval_batch_size=5, validation="x")
    workload = workload_of(stages.dpo(tiny_model), data, parallelism=Parallelism("ddp", 4))
    rows = {phase.name: phase.parts[0].rows for phase in workload.phases}
    assert rows == {"reference": 6, "update": 6, "validation": 10}  # two answers of each pair
    with pytest.raises(UserError, match=r"data\.batch_size 12 counts rows over all devices"):
        workload_of(stages.dpo(tiny_model), data, parallelism=Parallelism("ddp", 5))


def test_a_process_has_its_share_of_an_iteration(tiny_model):
    """Rows at a time stay, but where a share has fewer; what is known of the responses is that of all processes."""
    data = PromptDataModule(train="x", max_prompt_tokens=20, batch_size=16)
    ppo = PPOSettings(minibatch_size=8, microbatch_size=4, epochs=2)
    rollout = RolloutSettings(max_new_tokens=9, responses_per_prompt=2, batch_size=6, temperature=0.7)
    module = stages.rto(tiny_model, ppo=ppo, rollout=rollout)
    workload = workload_of(module, data, "bf16-mixed", Parallelism("ddp", 4))
    assert workload.samples == 32
    rows = {phase.name: phase.parts[0].rows for phase in workload.phases}
    assert rows == {"rollout": 6, "scoring": 8, "update of policy": 2, "update of critic": 2}
    passes = [(p.phase, p.role, p.rows, p.batches, p.steps) for p in workload.passes]
    assert passes == [
        ("rollout", "policy", 8, 2, 0),
        ("scoring", "policy", 8, 1, 0),
        ("scoring", "reference", 8, 1, 0),
        ("scoring", "critic", 8, 1, 0),
        ("update of policy", "policy", 16, 8, 8),
        ("update of critic", "critic", 16, 8, 8),
    ]
    module.ppo = PPOSettings(minibatch_size=2)
    with pytest.raises(UserError, match=r"ppo\.minibatch_size 2 counts rows over all devices"):
        workload_of(module, data, "bf16-mixed", Parallelism("ddp", 4))
