"""Hostile folders, checkpoints and settings: each is refused in one sentence or has no effect, and none runs code."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rto_lightning.backbone.loading import load_causal_lm, load_chat_tokenizer_from, load_pretrained
from rto_lightning.backbone.policy_backbone import PolicyBackbone
from rto_lightning.errors import UserError
from tests.faults.matrix import FaultMatrix
from tests.hostile import ADAPTERS, HARMLESS, MODELS, PWNED, TOKENIZERS, linked_outside
from tests.models import backbone_settings, make_backbone, write_tiny_classifier, write_tiny_model
from tests.roles import save_random_role

pytestmark = pytest.mark.slow

CANARY = "Canary-0123456789"


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, a DPO role and a reward role on it, and an outside reward model; not to be written to."""
    folder = tmp_path_factory.mktemp("good")
    model = write_tiny_model(folder / "model")
    roles = {name: Path(save_random_role(model, folder / name, name)) for name in ("dpo", "reward")}
    return {"model": model, "classifier": write_tiny_classifier(folder / "classifier"), **roles}


@pytest.fixture
def spoiled(good: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Copies a good folder and spoils it."""

    def make(kind: str, spoil: Callable[[Path], Any]) -> Path:
        folder = tmp_path / "hostile" / kind
        shutil.copytree(good[kind], folder)
        spoil(folder)
        return folder

    return make


@contextmanager
def refused(faults: FaultMatrix, fault: str, folder: Path, message: str) -> Iterator[None]:
    """Within it, something is refused in one sentence, and no code runs."""
    with faults.tried("trust", fault):
        with pytest.raises(UserError, match=message) as error:
            yield
        assert "\n" not in str(error.value)
        assert not (folder.parent / PWNED).exists()


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_hostile_role(name: str, good: dict[str, Path], spoiled: Callable[..., Path], faults: FaultMatrix) -> None:
    spoil, message = ADAPTERS[name]
    folder = spoiled("dpo", spoil)
    backbone = make_backbone(good["model"])
    with refused(faults, f"role: {name}", folder, message):
        backbone.add_role("dpo", str(folder))


@pytest.mark.parametrize("name", MODELS)
def test_a_hostile_model(name: str, spoiled: Callable[..., Path], faults: FaultMatrix) -> None:
    spoil, message = MODELS[name]
    folder = spoiled("model", spoil)
    with refused(faults, f"model: {name}", folder, message):
        load_causal_lm(str(folder), backbone_settings(folder), torch.float32)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_hostile_tokenizer(name: str, spoiled: Callable[..., Path], faults: FaultMatrix) -> None:
    spoil, message = TOKENIZERS[name]
    folder = spoiled("model", spoil)
    with refused(faults, f"tokenizer: {name}", folder, message):
        load_chat_tokenizer_from(str(folder))


@pytest.mark.parametrize("name", HARMLESS)
def test_what_has_no_effect(
    name: str, good: dict[str, Path], spoiled: Callable[..., Path], faults: FaultMatrix
) -> None:
    folder = spoiled("model", HARMLESS[name])
    question = [{"role": "user", "content": "Hi"}]
    with faults.tried("trust", f"model: {name}"):
        chat = load_chat_tokenizer_from(str(folder))
        model = load_causal_lm(str(folder), backbone_settings(folder), torch.float32)
        ids = chat.encode_prompt(question)
        assert ids == load_chat_tokenizer_from(str(good["model"])).encode_prompt(question)
        model.generate(torch.tensor([ids]), max_new_tokens=2, pad_token_id=2)
        assert not (folder.parent / PWNED).exists()


@pytest.mark.parametrize("head", ["garbage", "another shape", "not finite", "link"])
def test_a_hostile_head(head: str, good: dict[str, Path], spoiled: Callable[..., Path], faults: FaultMatrix) -> None:
    from safetensors.torch import save_file

    def spoil(folder: Path) -> None:
        path = folder / "head.safetensors"
        weight = torch.ones(1, 7 if head == "another shape" else 32)
        if head == "link":
            linked_outside(folder, path.name)
        elif head == "garbage":
            path.write_bytes(b"garbage")
        else:
            save_file(
                {"weight": weight if head == "another shape" else weight * torch.inf, "bias": torch.ones(1)}, path
            )

    folder = spoiled("reward", spoil)
    message = "no whole safetensors|does not hold the weight .1, 32.|not finite|link out of its folder"
    with refused(faults, f"head: {head}", folder, message):
        make_backbone(good["model"]).add_role("reward", str(folder), scalar_head=True)


def test_a_reward_model_without_its_head_is_not_made_up(good: dict[str, Path], faults: FaultMatrix) -> None:
    from transformers import AutoModelForSequenceClassification

    with refused(faults, "reward model: no head", good["model"], "lacks the weight score.weight of a Llama"):
        load_pretrained(AutoModelForSequenceClassification, str(good["model"]), num_labels=1)


# What has to go on working -------------------------------------------------------------------------------------


def test_links_to_folders_and_the_hubs_cache(good: dict[str, Path], tmp_path: Path, faults: FaultMatrix) -> None:
    """`outputs/current -> outputs/run3`, and snapshots whose files are links to blobs."""
    (tmp_path / "current").symlink_to(good["dpo"])
    blobs = tmp_path / "models--owner--name" / "blobs"
    snapshot = blobs.parent / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(good["model"].iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    with faults.tried("trust", "links that are right"):
        settings = backbone_settings(snapshot)
        backbone = PolicyBackbone(settings, load_chat_tokenizer_from(str(snapshot)))
        backbone.add_role("dpo", str(tmp_path / "current"))
        assert backbone.roles["dpo"].adapter == "dpo"
        weight = AutoModelForCausalLM.from_pretrained(good["model"]).get_input_embeddings().weight
        assert torch.equal(backbone.adapters.model.get_input_embeddings().weight.float(), weight)
