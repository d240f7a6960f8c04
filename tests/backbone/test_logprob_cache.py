"""Log-probabilities on disk: right, computed once, served for nothing else, whole or computed again."""

import os
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rto_lightning.backbone import LoraSettings, PolicyBackbone, Sequences, logprob_cache
from rto_lightning.backbone.logprob_cache import ResponseLogprobs, cached_logprobs, logprobs_key, weights_hash
from rto_lightning.errors import UserError
from tests.models import make_backbone, randomize, write_tiny_model

PROMPTS = [[1, 40, 41, 42, 43, 44], [1, 50, 51], [1, 60], [1, 50, 51]]
RESPONSES = [[70, 71, 2], [80, 81, 82, 83, 2], [90], [91, 92]]


@pytest.fixture
def backbone(tiny_model):
    made = make_backbone(tiny_model)
    made.add_role("reference")
    made.add_role("dpo", trainable=True)
    randomize(made.trained_parameters("dpo"))
    return made


@pytest.fixture
def forwards(monkeypatch):
    """The roles whose log-probabilities were computed, one entry for each forward."""
    roles = []
    compute = PolicyBackbone.token_logprobs

    def counted(self, name, *args, **options):
        roles.append(name)
        return compute(self, name, *args, **options)

    monkeypatch.setattr(PolicyBackbone, "token_logprobs", counted)
    return roles


def cached(backbone, folder, role="dpo", **options):
    return cached_logprobs(backbone, role, PROMPTS, RESPONSES, folder, progress=False, **options)


def same(first, second):
    return torch.equal(first.values, second.values) and torch.equal(first.offsets, second.offsets)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.data())
def test_padded_holds_the_responses_asked_for(lengths, data):
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    logprobs = ResponseLogprobs(-1 - torch.arange(int(offsets[-1]), dtype=torch.float32), offsets)
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=10))
    padded, mask = logprobs.padded(torch.tensor(rows))
    assert len(logprobs) == len(lengths)
    assert padded.shape == mask.shape == (len(rows), max(lengths[row] for row in rows))
    for row, values, valid in zip(rows, padded, mask, strict=True):
        assert values[valid].tolist() == logprobs.response(row).tolist() and int(valid.sum()) == lengths[row]
        assert not values[~valid].any()


@pytest.mark.parametrize("role", ["reference", "dpo"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_values_are_those_of_each_response_alone(backbone, tmp_path, role, batch_size):
    logprobs = cached(backbone, tmp_path, role, batch_size=batch_size)
    assert logprobs.values.dtype == torch.float64 and len(logprobs) == len(RESPONSES)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        expected, _ = backbone.token_logprobs(role, Sequences.from_lists([prompt], [response], pad_id=0))
        torch.testing.assert_close(logprobs.response(row), expected[0], rtol=0, atol=1e-12)


def test_forward_runs_once_for_a_role_and_its_data(backbone, forwards, tmp_path):
    first = cached(backbone, tmp_path, batch_size=2)
    assert forwards == ["dpo"] * 2
    assert same(cached(backbone, tmp_path, batch_size=3), first)
    assert forwards == ["dpo"] * 2
    cached(backbone, tmp_path, "reference")
    assert forwards == ["dpo"] * 2 + ["reference"] and len(list(tmp_path.iterdir())) == 2


def test_progress_is_shown_where_it_is_wanted(backbone, tmp_path, capsys):
    cached(backbone, tmp_path)
    assert capsys.readouterr().out == ""
    cached_logprobs(backbone, "reference", PROMPTS, RESPONSES, tmp_path)
    assert "Log-probabilities of reference: 100%" in capsys.readouterr().out


def test_file_can_be_read_without_this_package_and_by_others(backbone, tmp_path):
    logprobs = cached(backbone, tmp_path / "new" / "folder")
    [path] = (tmp_path / "new" / "folder").iterdir()
    assert same(ResponseLogprobs(*(load_file(path)[name] for name in ("logprobs", "offsets"))), logprobs)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["role"] == "dpo" and file.metadata()["model"] == backbone.settings.model
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


# The key.


@pytest.mark.parametrize(
    ("prompts", "responses"),
    [
        (PROMPTS, [*RESPONSES[:3], [91, 93]]),
        ([[1, 40, 41, 42, 43, 45], *PROMPTS[1:]], RESPONSES),
        ([[1, 40, 41, 42, 43], *PROMPTS[1:]], [[44, 70, 71, 2], *RESPONSES[1:]]),  # the same ids, cut elsewhere
        (PROMPTS[::-1], RESPONSES[::-1]),
        (PROMPTS[:3], RESPONSES[:3]),
        (PROMPTS, [*RESPONSES[:3], [91]]),
    ],
)
def test_other_data_have_another_key(backbone, prompts, responses):
    assert logprobs_key(backbone, "dpo", prompts, responses) != logprobs_key(backbone, "dpo", PROMPTS, RESPONSES)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float32"},
        {"dtype": "float32", "quantization": "nf4"},
        {"dtype": "bfloat16", "quantization": "nf4"},
        {"attention": "eager"},
    ],
)
def test_other_settings_have_another_key(backbone, tiny_model, changes):
    other = make_backbone(tiny_model, **changes)
    other.add_role("reference")
    key = logprobs_key(other, "reference", PROMPTS, RESPONSES)
    assert key != logprobs_key(backbone, "reference", PROMPTS, RESPONSES)
    again = make_backbone(tiny_model, **changes)
    again.add_role("reference")
    assert key == logprobs_key(again, "reference", PROMPTS, RESPONSES)


def test_autocast_matmul_precision_and_format_have_another_key(backbone, monkeypatch):
    keys = [logprobs_key(backbone, "dpo", PROMPTS, RESPONSES)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        keys.append(logprobs_key(backbone, "dpo", PROMPTS, RESPONSES))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    keys.append(logprobs_key(backbone, "dpo", PROMPTS, RESPONSES))
    torch.set_float32_matmul_precision(before)
    monkeypatch.setattr(logprob_cache, "FORMAT", 0)
    keys.append(logprobs_key(backbone, "dpo", PROMPTS, RESPONSES))
    assert len(set(keys)) == 4


def test_one_weight_that_moves_makes_another_role(backbone):
    hashes = {weights_hash(backbone, "dpo"), weights_hash(backbone, "reference")}
    for weight in (*backbone.trained_parameters("dpo"), *backbone.adapters.model.parameters()):
        with torch.no_grad():
            weight.view(-1)[-1] += 1e-9
        hashes.add(weights_hash(backbone, "dpo"))
    count = len(backbone.trained_parameters("dpo")) + len(list(backbone.adapters.model.parameters()))
    assert len(hashes) == 2 + count


def test_scale_of_an_adapter_counts(tiny_model):
    hashes = set()
    for alpha in (8, 16):
        made = make_backbone(tiny_model, lora=LoraSettings(rank=4, alpha=alpha))
        made.add_role("dpo", trainable=True)
        for number, weight in enumerate(made.trained_parameters("dpo")):
            torch.nn.init.constant_(weight, number)
        hashes.add(weights_hash(made, "dpo"))
    assert len(hashes) == 2


def test_scale_of_four_bit_weights_counts(tmp_path):
    """Twice the weights have the same 4-bit codes; their scales differ."""
    hashes = set()
    for number in range(2):
        made = make_backbone(write_tiny_model(tmp_path / str(number)), dtype="float32", quantization="nf4")
        made.add_role("reference")
        hashes.add(weights_hash(made, "reference"))
        path = tmp_path / str(number) / "model.safetensors"
        weights = load_file(path)
        name = "model.layers.0.mlp.up_proj.weight"
        save_file({**weights, name: 2 * weights[name]}, path, {"format": "pt"})
        made = make_backbone(path.parent, dtype="float32", quantization="nf4")
        made.add_role("reference")
        hashes.add(weights_hash(made, "reference"))
    assert len(hashes) == 2


def test_setting_of_the_model_that_is_no_weight_counts(backbone, tiny_model):
    other = make_backbone(tiny_model)
    other.add_role("reference")
    assert weights_hash(other, "reference") == weights_hash(backbone, "reference")
    other.adapters.model.config.rms_norm_eps = 0.1
    assert weights_hash(other, "reference") != weights_hash(backbone, "reference")


def test_names_and_company_do_not_count(backbone, tiny_model, tmp_path):
    """The same weights are the same role in a folder, by a name, beside roles and in a mode that are others."""
    backbone.save_role("dpo", tmp_path / "dpo", backbone.card("dpo", "dpo", {}))
    shutil.copytree(tiny_model, tmp_path / "model")
    other = make_backbone(tmp_path / "model", gradient_checkpointing=True, logprob_chunk_tokens=99)
    other.add_role("critic", trainable=True)
    other.add_role("mine", str(tmp_path / "dpo"), trainable=True)
    assert weights_hash(other, "mine") == weights_hash(backbone, "dpo")
    full = make_backbone(tmp_path / "model", mode="full")
    full.add_role("reference")
    assert weights_hash(full, "reference") == weights_hash(backbone, "reference")
    assert logprobs_key(other, "mine", PROMPTS, RESPONSES) == logprobs_key(backbone, "dpo", PROMPTS, RESPONSES)


# The file.


def truncate(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip_a_bit_of_a_number(path):
    contents = bytearray(path.read_bytes())
    contents[-9] ^= 1
    path.write_bytes(contents)


def put_another_file_there(path):
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        save_file(tensors, path, {**file.metadata(), "key": "another"})


def drop_a_tensor(path):
    save_file({"offsets": load_file(path)["offsets"]}, path)


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip_a_bit_of_a_number,
        put_another_file_there,
        drop_a_tensor,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("not a file of tensors"),
    ],
)
def test_damaged_file_is_computed_again_with_a_warning(backbone, forwards, tmp_path, caplog, damage):
    first = cached(backbone, tmp_path)
    [path] = tmp_path.iterdir()
    damage(path)
    assert same(cached(backbone, tmp_path), first)
    [record] = caplog.records
    assert f"{path} is damaged" in record.getMessage() and "computed again" in record.getMessage()
    assert len(forwards) == 2
    assert same(cached(backbone, tmp_path), first) and len(forwards) == 2 and len(caplog.records) == 1


def test_two_writers_at_once_leave_one_whole_file(backbone, forwards, tmp_path, monkeypatch, caplog):
    replace = os.replace
    seen = []

    def while_another_writes(source, target):
        if not seen:
            assert not target.exists()
            seen.append(source)
            seen.append(cached(backbone, tmp_path))
        replace(source, target)

    monkeypatch.setattr(os, "replace", while_another_writes)
    first = cached(backbone, tmp_path)
    assert len(forwards) == 2 and same(first, seen[1])
    assert same(cached(backbone, tmp_path), first) and len(forwards) == 2
    assert len(list(tmp_path.iterdir())) == 1 and not caplog.records


def test_full_disk_costs_the_file_only(backbone, tmp_path, monkeypatch, caplog):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    logprobs = cached(backbone, tmp_path)
    assert len(logprobs) == len(RESPONSES) and not list(tmp_path.iterdir())
    assert "No space left on device" in caplog.text


def test_folder_that_cannot_be_written_to_is_refused_before_the_work(backbone, forwards, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be kept in .*file .*name a folder that can be written to"):
        cached(backbone, tmp_path / "file")
    assert not forwards
