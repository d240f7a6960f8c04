"""What every rank of a test runs: something is not finite on rank 1 alone, and all ranks have to do the same about it.

python -m torch.distributed.run --standalone --nproc_per_node 2 -m tests.faults.numerics_worker SETTINGS.json
"""

import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from rto_lightning.errors import UserError
from rto_lightning.modules import NumericsSettings
from rto_lightning.parallel import gather_objects, rank
from rto_lightning.strategies import resolve_strategy
from tests.modules import stages
from tests.modules.injection import Fault, Inject, Undo, output, score_of_function, weights

AT, STEPS = 1, 3
INJECTIONS: dict[str, tuple[str, Inject, str]] = {
    "sft": ("sft", output("token_logprobs", "policy"), "the policy's log-probabilities"),
    "dpo": ("dpo", output("token_logprobs", "reference", -math.inf), "the reference's log-probabilities"),
    "rto score": ("rto", score_of_function(math.nan), "the scores of tests.modules.injection:scores"),
    "rto policy": ("rto", output("token_logprobs", "policy"), "the policy loss"),
}
"""By name the stage, what goes wrong, and what it is called."""
DATA = {"sft": "demonstrations", "dpo": "preferences", "rto": "prompts"}


def fit(settings: dict[str, str], fault: str, action: Any, callback: Any) -> Any:
    """The module after a run."""
    torch.manual_seed(0)
    stage, model, mode = INJECTIONS[fault][0], Path(settings["model"]), settings["mode"]
    if stage == "rto":
        scores = "tests.modules.injection:scores"
        module: Any = stages.rto(model, backbone={"mode": mode}, seed=1, reward_function=scores)
    else:
        module = getattr(stages, stage)(model, mode=mode)
    module.guard.settings = NumericsSettings(action=action)
    folder, strategy = Path(settings["out"]) / fault / action, resolve_strategy(settings["strategy"])
    trainer = stages.trainer(folder, STEPS, strategy=strategy, devices=2, callbacks=[callback])
    trainer.fit(module, getattr(stages, DATA[stage])(settings))
    assert trainer.global_step == STEPS
    return module


def on_rank_1(inject: Inject) -> Inject:
    """The same, and nothing on other ranks."""
    return lambda module: inject(module) if rank() == 1 else nullcontext()


def check(settings: dict[str, str], fault: str) -> None:
    """Run with both actions.

    Raises:
        AssertionError: if the ranks do not agree, or a weight has learned from what was not finite.
    """
    _, inject, name = INJECTIONS[fault]
    try:
        fit(settings, fault, "stop", Fault(on_rank_1(inject), AT))
        raise AssertionError("the run has not stopped")
    except UserError as error:
        # A loss is that of all ranks, so that each of them sees it.
        of_rank = 0 if name == "the policy loss" else 1
        assert f"values of {name} are NaN" in str(error) and f"on rank {of_rank};" in str(error), error
        assert len(set(gather_objects(str(error)))) == 1
    dump = torch.load(Path(settings["out"]) / fault / f"stop/nonfinite/step-{AT}.pt", weights_only=True)
    assert len(dump["batches"]) == 2 if "batches" in dump else len(dump["messages"]) == 4

    module = fit(settings, fault, "skip", Fault(on_rank_1(inject), AT))
    trained = weights(module)
    assert module.guard.state() == [1, 1, AT] and all(weight.isfinite().all() for weight in trained)
    if settings["strategy"] == "ddp":
        undone = weights(fit(settings, fault, "skip", Undo(AT, "policy" if fault == "rto policy" else None)))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(trained, undone, strict=True))
    print(f"{fault}: rank {rank()} agrees", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in INJECTIONS:
        check(json.loads(Path(sys.argv[1]).read_text()), each)
