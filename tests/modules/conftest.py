"""Data files of a few rows and the settings with which a stage of a tiny model takes a second."""

import json

import pytest
import torch

from tests.modules import stages


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Preferences, prompts and demonstrations: the chosen answers say "yes", the rejected ones "no"."""
    folder = tmp_path_factory.mktemp("data")
    prompts = [f"Question {n}?" for n in range(12)]
    preferences = [
        {"prompt": prompt, "chosen": "yes" + "!" * (n % 3), "rejected": "no" + "." * (n % 4)}
        for n, prompt in enumerate(prompts)
    ]
    return {
        "preferences": _write(folder / "preferences.jsonl", preferences),
        "prompts": _write(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts]),
        "demonstrations": _write(
            folder / "demonstrations.jsonl", [{"prompt": p["prompt"], "response": p["chosen"]} for p in preferences]
        ),
    }


@pytest.fixture(scope="session")
def roles(tiny_model, files, tmp_path_factory):
    """A DPO role and a reward role of the tiny model, for each mode."""
    folder = tmp_path_factory.mktemp("roles")
    made = {}
    for mode in ("adapters", "full"):
        torch.manual_seed(0)
        for name, make in (("dpo", stages.dpo), ("reward", stages.reward_model)):
            module = stages.fit(make(tiny_model, mode=mode), stages.preferences(files), folder / "runs", steps=6)
            made[mode, name] = str(folder / f"{mode}_{name}")
            module.save_role(folder / f"{mode}_{name}")
    return made
