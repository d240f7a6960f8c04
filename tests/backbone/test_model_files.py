"""What is read of a folder before it is loaded; `tests/faults/test_trust.py` loads hostile ones."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rto_lightning.backbone.fingerprints import base_fingerprint
from rto_lightning.backbone.model_files import (
    check_folder,
    check_names,
    check_source,
    read_settings,
    tensor_shapes,
    weight_files,
)
from rto_lightning.backbone.roles import RoleCard
from rto_lightning.errors import UserError
from tests.hostile import ADAPTERS, PWNED, payload
from tests.models import make_backbone, write_tiny_model
from tests.roles import save_random_role


def test_the_payload_of_these_tests_runs_where_it_may(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    torch.save(payload(tmp_path / "folder"), tmp_path / "evil.pt")
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / PWNED).is_dir()


@pytest.mark.parametrize("name", ["module to import", "a weight of the base", "weights behind a link"])
def test_hostile_adapters_are_refused(name: str, tiny_model: Path, tmp_path: Path) -> None:
    spoil, message = ADAPTERS[name]
    folder = tmp_path / "hostile" / "role"
    save_random_role(tiny_model, folder, "dpo")
    spoil(folder)
    with pytest.raises(UserError, match=message):
        make_backbone(tiny_model).add_role("dpo", str(folder))


def test_files_of_a_folder_may_be_links_to_each_other(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("")
    (folder / "b").symlink_to("a")
    (tmp_path / "link").symlink_to(folder)
    check_folder(folder)
    check_folder(tmp_path / "link")
    (tmp_path / "snapshots").symlink_to(tmp_path)  # only the resolved place counts as a cache of the hub
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "c").write_text("")
    (folder / "c").symlink_to("../blobs/c")
    with pytest.raises(UserError, match="is a link out of its folder"):
        check_folder(tmp_path / "snapshots" / "folder")


@settings(deadline=None)
@given(st.text(st.sampled_from("abc./\\~ "), min_size=1))
def test_names_that_are_taken_stay_beside_the_file(name: str) -> None:
    home = Path("/home/model")
    try:
        check_names([name], home / "index.json")
    except UserError:
        return
    assert (home / name).parent == home and ".." not in name.split("/")


@settings(max_examples=40, deadline=None)
@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=3), lambda s: st.lists(s) | st.dictionaries(st.text(max_size=2), s)
    )
)
def test_settings_are_objects(tmp_path_factory: pytest.TempPathFactory, contents: object) -> None:
    path = tmp_path_factory.getbasetemp() / "settings.json"
    path.write_text(json.dumps(contents))
    if isinstance(contents, dict):
        assert read_settings(path) == contents
    else:
        with pytest.raises(UserError, match="holds no JSON object"):
            read_settings(path)


def test_weights_in_several_files(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    single = write_tiny_model(tmp_path / "single")
    AutoModelForCausalLM.from_pretrained(single).save_pretrained(tmp_path / "many", max_shard_size="20KB")
    files = weight_files(str(tmp_path / "many"))
    assert len(set(files.values())) > 1 and files.keys() == weight_files(str(single)).keys()
    assert base_fingerprint(str(tmp_path / "many")) == base_fingerprint(str(single))


def test_shapes_come_from_the_header(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3), "b": torch.ones(())}, tmp_path / "x.safetensors")
    assert tensor_shapes(tmp_path / "x.safetensors") == {"a": (2, 3), "b": ()}


def test_a_hub_model_that_is_not_in_the_cache_is_left_to_the_loader() -> None:
    check_source("no-such-owner/no-such-model")


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"score_mean": 0.0, "score_std": 0.0}, True),
        ({"score_mean": float("nan"), "score_std": 1.0}, True),
        ({"settings": {"score_statistics": {"a": [1]}}}, True),
        ({"settings": {"score_statistics": {"a": [0, 1.5]}}, "score_mean": 1, "score_std": 2}, False),
        ({"format": 2}, True),
    ],
)
def test_the_card_of_a_role(tiny_model: Path, tmp_path: Path, changes: dict[str, object], refused: bool) -> None:
    path = Path(save_random_role(tiny_model, tmp_path / "role", "reward")) / "role.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    if refused:
        with pytest.raises(UserError, match=r"role\.json (is damaged|has format 2)"):
            RoleCard.read(path.parent)
    else:
        assert RoleCard.read(path.parent) is not None
