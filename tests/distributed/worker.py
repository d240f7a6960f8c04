"""What every rank of a test runs: the cases of a JSON file, one trainer after another in one process group.

python -m torch.distributed.run --standalone --nproc_per_node 2 -m tests.distributed.worker CASES.json
"""

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from rto_lightning.callbacks import LogSamples
from rto_lightning.data import DemonstrationDataModule, PreferenceDataModule, PromptDataModule
from rto_lightning.modules.rto_settings import CriticSettings, PPOSettings, RewardSettings
from rto_lightning.parallel import rank
from rto_lightning.rollout import RolloutSettings
from rto_lightning.strategies import resolve_strategy
from tests.modules import stages

DATA: dict[str, Any] = {
    "sft": DemonstrationDataModule,
    "dpo": PreferenceDataModule,
    "reward_model": PreferenceDataModule,
    "rto": PromptDataModule,
}


@dataclass
class Case:
    """A stage, how it is run, and where its results go."""

    out: str
    """A folder: `policy/` (and `critic/`) are the trained roles, `metrics.json` the logged metrics of each step."""
    stage: str
    mode: str
    strategy: str
    model: str
    data: str
    roles: dict[str, str]
    steps: int = 3
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the RTO stage by their group: `rollout`, `rewards`, `ppo`, `critic`."""
    backbone: dict[str, Any] = field(default_factory=dict)
    checkpoint_at: int | None = None
    """Save a checkpoint `checkpoint.ckpt` at this step."""
    resume: str | None = None
    """Checkpoint to resume from."""
    batch_size: int = 8

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self)))


def build(case: Case) -> Any:
    """The stage's module, in float64 so that the order of sums moves no sampled token."""
    backbone = {"mode": case.mode, "dtype": "float64", **case.backbone}
    model = Path(case.model)
    if case.stage == "sft":
        return stages.sft(model, **backbone)
    if case.stage == "dpo":
        return stages.dpo(model, **backbone)
    if case.stage == "reward_model":
        return stages.reward_model(model, **backbone)
    options: dict[str, Any] = {
        "rollout": RolloutSettings(**{"max_new_tokens": 6, **case.options.get("rollout", {})}),
        "rewards": RewardSettings(**{"normalization_samples": 16, **case.options.get("rewards", {})}),
        "ppo": PPOSettings(**{"microbatch_size": 1, **case.options.get("ppo", {})}),
        "critic": CriticSettings(**case.options.get("critic", {})),
        "ema_decay": case.options.get("ema_decay"),
    }
    return stages.rto(
        model, dpo=case.roles["dpo"], reward=case.roles["reward"], reward_function=None, backbone=backbone, **options
    )


def run(case: Case) -> None:
    """Train, save the roles and the metrics."""
    out = Path(case.out)
    seed_everything(0, verbose=False)  # also what Lightning sets again when it starts several processes
    module, recorder = build(case), stages.Recorder()
    callbacks: list[Any] = [recorder, *([LogSamples(prompts=2, every_n_iterations=2)] if case.stage == "rto" else [])]
    if case.checkpoint_at is not None:
        every = {"every_n_train_steps": case.checkpoint_at, "save_top_k": -1}
        callbacks.append(ModelCheckpoint(out, filename="checkpoint", **every))
    trainer = stages.trainer(
        out,
        case.steps,
        strategy=resolve_strategy(case.strategy),
        devices="auto" if case.strategy == "auto" else world_size(),
        callbacks=callbacks,
        logger=True,
        log_every_n_steps=1,
        enable_checkpointing=case.checkpoint_at is not None,
    )
    limits = {"max_prompt_tokens": 100, "batch_size": case.batch_size, "seed": 1}
    data = DATA[case.stage](train=case.data, validation=case.data, **limits)
    trainer.fit(module, data, ckpt_path=case.resume)
    module.save_role(out / "policy")
    if "critic" in module.backbone.roles:
        module.backbone.save_role("critic", out / "critic", module.backbone.card("critic", "critic", {}))
    if rank() == 0:
        (out / "metrics.json").write_text(json.dumps(recorder.metrics))


def world_size() -> int:
    """Ranks that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def main(path: str) -> None:
    """Run the cases of a file."""
    torch.set_num_threads(1)
    for settings in json.loads(Path(path).read_text()):
        if "WORLD_SIZE" not in os.environ:
            os.environ.pop("MASTER_PORT", None)  # of the case before, which another process may have by now
        run(Case(**settings))


if __name__ == "__main__":
    main(sys.argv[1])
