"""The measurement on a card (marker `gpu`), and a trial of all of it on the CPU with tiny models."""

import json
import math
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from rto_lightning.backbone.loading import load_causal_lm
from tests.gpu import memory_and_speed, numerics
from tests.gpu.arithmetic import Work, causal_pairs, peak_tflops
from tests.gpu.random_llama import random_weights, write_folder
from tests.gpu.run import main
from tests.gpu.shapes import TINY_ITERATION, NumericsShape
from tests.models import backbone_settings, tiny_config

FIVE = ["critic", "dpo", "policy", "reference", "reward"]
needs_a_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_a_card
def test_float32_agrees_with_the_cpu(tmp_path):
    records = numerics.compare(torch.device("cuda", 0), NumericsShape(), tmp_path, print)
    assert numerics.failures(records) == []
    for name in NumericsShape().models:
        # Quantized on either device: a few weights may fall to the other side of a threshold, most may not.
        to_float32, to_nf4 = (r for r in records if r["model"] == name and r["variant"] == "nf4 float32")
        assert to_nf4["against"] == "nf4 float32"
        assert to_nf4["logprobs_mean"] < 0.1 * to_float32["logprobs_mean"]


@pytest.mark.gpu
@needs_a_card
def test_an_iteration_on_an_nf4_base(tmp_path):
    device, deadline = torch.device("cuda", 0), time.monotonic() + 300
    result = memory_and_speed.measure(device, TINY_ITERATION, "bf16-mixed", deadline, tmp_path, 1.0, print)
    check_iterations(result)
    for phase in result["phases"]:
        assert 0 < phase["peak_allocated"] <= phase["peak_reserved"]


def check_iterations(result):
    shape = TINY_ITERATION
    assert result["roles"] == FIVE
    assert 0.95 < result["copies_of_the_base"] < 1.05
    assert all(math.isfinite(norm) and norm > 0 for norm in result["gradient_norms"].values())
    names = ["loading"] + ["rollout", "scoring", "update"] * 2
    assert [phase["phase"] for phase in result["phases"]] == names
    for phase in result["phases"][1:]:
        tokens = shape.response_tokens if phase["phase"] == "rollout" else shape.prompt_tokens + shape.response_tokens
        assert phase["tokens"] == shape.prompts * tokens
        assert phase["tokens_per_second"] == pytest.approx(phase["tokens"] / phase["seconds"])
        assert phase["share_of_peak"] == pytest.approx(phase["flops"] / phase["seconds"] / 1e12)


def test_the_script_runs_on_a_cpu(capsys, tmp_path):
    output = tmp_path / "gpu.json"
    status = main(["--device", "cpu", "--tiny", "--peak-tflops", "1", "--output", str(output)])
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result == json.loads(output.read_text())
    assert status == 0 and result["numerics"]["failures"] == []
    by_pair = {(record["variant"], record["against"]): record for record in result["numerics"]["records"]}
    for variant in ("float32", "nf4 float32"):  # the CPU against itself
        same = by_pair[variant, variant]
        assert [same[key] for key in ("logprobs", "values", "scores", "gradient")] == [0] * 4
        assert same["greedy_tokens"] == same["sampled_tokens"] == 1
    assert by_pair["float32", "float32"]["update"] == by_pair["float32", "float32"]["metrics"] == 0
    for variant in ("bfloat16", "nf4 float32", "nf4 bfloat16"):
        assert by_pair[variant, "float32"]["logprobs"] > 1e-4
    check_iterations(result["memory"])


def test_one_part_alone(capsys):
    assert main(["--device", "cpu", "--tiny", "--only", "memory", "--iterations", "1", "--prompts", "2"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "numerics" not in result
    assert [phase["tokens"] for phase in result["memory"]["phases"]] == [0, 12, 36, 36]


def test_no_iteration_begins_after_the_time_limit(capsys):
    main(["--device", "cpu", "--tiny", "--only", "memory", "--iterations", "3", "--time-limit", "0"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [phase["phase"] for phase in result["memory"]["phases"]] == ["loading", "rollout", "scoring", "update"]


def test_what_is_too_far_apart_is_named():
    fine = dict.fromkeys(numerics.LIMITS, 0.0) | {"model": "tiny", "variant": "float32", "greedy_tokens": 1.0}
    assert numerics.failures([fine]) == []
    assert numerics.failures([fine | {"gradient": 0.5, "variant": "bfloat16"}]) == []
    assert numerics.failures([fine | {"gradient": 0.5}]) == ["tiny: gradient off by 5.0e-01"]
    assert numerics.failures([fine | {"scores": math.nan}]) == ["tiny: scores off by nan"]
    assert numerics.failures([fine | {"greedy_tokens": 0.75}]) == ["tiny: 25% of greedy responses differ"]


def test_random_weights_are_held_as_loaded_ones_are(tiny_model, tmp_path):
    folder = write_folder(tmp_path / "random", {})
    settings = backbone_settings(folder, dtype="float32", quantization="nf4")
    with random_weights():
        random = load_causal_lm(str(folder), settings, torch.float32, quantized=True)
    loaded = load_causal_lm(str(tiny_model), settings, torch.float32, quantized=True)
    modules = dict(loaded.named_modules())
    assert modules.keys() == dict(random.named_modules()).keys()
    assert type(modules["model.layers.0.mlp.up_proj"]).__name__ == "Linear4bit"
    for name, module in random.named_modules():
        assert type(module) is type(modules[name]), name
        if hasattr(module, "compute_dtype"):
            found, expected = module.weight.quant_state, modules[name].weight.quant_state
            assert (found.quant_type, found.blocksize, found.nested) == ("nf4", expected.blocksize, expected.nested)
            assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
            assert module.compute_dtype == modules[name].compute_dtype
            assert module.weight.shape == modules[name].weight.shape
    for (name, found), expected in zip(random.named_buffers(), loaded.buffers(), strict=True):
        assert torch.equal(found, expected), name


def test_work_is_what_torch_counts():
    config = tiny_config()
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager")
    work, ids = Work.of(config), torch.ones(2, 7, dtype=torch.int64)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model.requires_grad_(False)
    counter = FlopCounterMode(display=False)
    with counter:
        logits = model(inputs_embeds=embedded).logits
    square = 2 * 7 * 7  # eager attention computes what it then masks
    assert counter.get_total_flops() == pytest.approx(work.forward(14, square, 14), rel=1e-3)
    with counter:
        logits.sum().backward()
    assert counter.get_total_flops() == pytest.approx(work.forward(14, 2 * square, 14), rel=1e-3)


def test_phases_are_made_of_forwards():
    work = Work(body_weights=10, output_weights=100, attention_width=1)
    assert causal_pairs(4) == 1 + 2 + 3 + 4
    assert work.rollout(2, 3, 2) == 2 * work.forward(4, 10, 2)
    assert work.scoring(1, 3, 2) == 3 * work.forward(5, 15, 2) + 2 * work.forward(5, 15, 0)
    assert work.update(1, 3, 2) == 2 * work.forward(5, 15, 2) + work.forward(10, 60, 0)


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GeForce RTX 4090", 165.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", None),
        ("CPU", None),
    ],
)
def test_the_peak_of_a_card_goes_by_its_name(card, peak):
    assert peak_tflops(card) == peak
