"""Data files of a few rows and the settings with which a stage of a tiny model takes a second."""

import json

import pytest


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
