"""The README's table of what is logged."""

from typing import Any

from rto_lightning.modules import StageModule
from tests.modules import stages
from tests.test_readme import names, table

NOT_HERE = {"rollout/mismatch", "rollout/mismatch_kl", "skipped_steps"}
"""What takes vLLM, or a step that is not finite."""


def logged(module: StageModule, data: Any, folder, steps: int = 1) -> set[str]:
    """The names in one step of training and in validation, without `train/` and `validation/`."""
    trainer = stages.trainer(folder, steps, log_every_n_steps=1)
    trainer.fit(module, data)
    return {name.partition("/")[2] for name in trainer.callback_metrics}


def test_the_table_has_what_the_stages_log(tiny_model, files, roles, tmp_path):
    pairs = stages.preferences(files)
    preference = [logged(stages.dpo(tiny_model, loss=loss), pairs, tmp_path) for loss in ("dpo", "tdpo1")]
    found = {
        "SFT": logged(stages.sft(tiny_model), stages.demonstrations(files), tmp_path),
        "DPO": set().union(*preference),
        "reward model": logged(stages.reward_model(tiny_model), pairs, tmp_path),
        "RTO": logged(stages.full_rto(tiny_model, roles), stages.prompts(files), tmp_path),
    }
    listed = {name: cells[1] for cells in table("metric | stage") for name in names(cells[0]) if name not in NOT_HERE}
    assert set().union(*found.values()) == set(listed)
    for name, where in listed.items():
        assert {stage for stage in found if name in found[stage]} == {stage for stage in found if stage in where}, name
