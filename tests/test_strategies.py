"""Which strategies run a stage, and what the others are told."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from rto_lightning.cli import main
from rto_lightning.errors import UserError
from rto_lightning.modules.rto_inputs import check_even_rows
from rto_lightning.modules.rto_settings import PPOSettings
from rto_lightning.optimizers import check_shardable
from rto_lightning.parallel import clip_gradients, gather_rows, largest, rank, ranks, sum_gradients, sum_over_ranks
from rto_lightning.strategies import (
    FullyShardedStrategy,
    check_checkpoint,
    check_processes,
    check_strategy,
    resolve_strategy,
)
from tests.modules import stages


@pytest.mark.parametrize("name", ["auto", "ddp", "ddp_find_unused_parameters_true"])
def test_lightning_s_own_names_stay(name: str) -> None:
    assert resolve_strategy(name) == name


@pytest.mark.parametrize(("name", "offload"), [("fsdp", False), ("model_parallel", False), ("fsdp_offload", True)])
def test_fsdp_is_fsdp2(name: str, offload: bool) -> None:
    strategy = resolve_strategy(name)
    assert type(strategy) is FullyShardedStrategy and strategy.cpu_offload is offload


@pytest.mark.parametrize("name", ["deepspeed", "deepspeed_stage_3", "ddp_spawn", "xla", "nonsense"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"trainer.strategy {name} does not run.*set it to auto.*ddp.*fsdp"):
        resolve_strategy(name)


def test_other_objects_are_refused() -> None:
    for strategy in (FSDPStrategy(), ModelParallelStrategy()):
        with pytest.raises(UserError, match=f"{type(strategy).__name__} does not run"):
            check_strategy(strategy)
    for strategy in (SingleDeviceStrategy(torch.device("cpu")), DDPStrategy(), FullyShardedStrategy()):
        check_strategy(strategy)


def test_the_command_refuses_before_it_loads_anything(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "sft.yaml"
    config.write_text(
        f"trainer: {{accelerator: cpu, strategy: deepspeed, default_root_dir: {tmp_path / 'run'}}}\n"
        f"model: {{class_path: SFTModule, init_args: {{backbone: {{model: {tiny_model}}}}}}}\n"
        "data: {class_path: DemonstrationDataModule, init_args: {train: nowhere.jsonl}}\n"
    )
    assert main(["fit", "--config", str(config)]) == 1
    assert "trainer.strategy deepspeed does not run" in capsys.readouterr().err


def test_a_process_without_a_device_is_refused() -> None:
    class Environment:
        def local_rank(self) -> int:
            return 1

    strategy = DDPStrategy(parallel_devices=[torch.device("cpu")], cluster_environment=Environment())  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"process 1 .* trainer.devices gives 1"):
        check_processes(strategy)
    strategy.parallel_devices = [torch.device("cpu")] * 2
    check_processes(strategy)


def test_a_folder_of_shards_wants_fsdp(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder of shards"):
        check_checkpoint(DDPStrategy(), tmp_path)
    check_checkpoint(FullyShardedStrategy(), tmp_path)
    check_checkpoint(DDPStrategy(), tmp_path / "last.ckpt")


def test_uneven_rows_are_not_predicted_together() -> None:
    trainer: Any = SimpleNamespace(world_size=2, datamodule=SimpleNamespace(rows={"predict": range(9)}))
    check_even_rows(trainer, together=False)
    with pytest.raises(UserError, match=r"the 9 rows .* over 2 devices.*data.max_eval_rows to 8"):
        check_even_rows(trainer, together=True)


def test_8_bit_optimizers_do_not_step_parts_of_weights() -> None:
    import bitsandbytes

    with pytest.raises(UserError, match="AdamW8bit does not step weights that FSDP spreads"):
        check_shardable(bitsandbytes.optim.AdamW8bit, "model.optimizer")
    check_shardable(stages.adam, "model.optimizer")


def test_minibatches_that_ranks_cannot_share_are_refused() -> None:
    PPOSettings(minibatch_size=4).check(8, ranks=4)
    PPOSettings().check(6, ranks=2)
    for settings, samples, count in ((PPOSettings(minibatch_size=4), 8, 3), (PPOSettings(), 6, 4)):
        with pytest.raises(UserError, match=f"do not split evenly over {count} devices"):
            settings.check(samples, ranks=count)


def test_one_process_agrees_with_itself() -> None:
    assert (rank(), ranks(), largest(3, 5)) == (0, 1, (3, 5))
    table = torch.arange(6).view(3, 2)
    assert gather_rows(table) is table and sum_over_ranks(table) is table
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    sum_gradients([weight])
    assert clip_gradients([weight], 1.0) == 5.0
    assert torch.allclose(weight.grad, torch.tensor([0.6, 0.8]))
