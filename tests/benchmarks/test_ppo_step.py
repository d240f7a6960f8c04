"""The pure parts of the PPO step benchmark, and its own side on a model of two layers; nothing is timed."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken

from rto_lightning.backbone import load_chat_tokenizer
from tests.benchmarks.ppo_step_floor import Floor
from tests.benchmarks.ppo_step_floor import measure as measure_floor
from tests.benchmarks.ppo_step_models import (
    WORDS,
    backbone_settings,
    link_model,
    prepare,
    text_of_length,
    write_random_model,
)
from tests.benchmarks.ppo_step_ours import PHASES
from tests.benchmarks.ppo_step_ours import measure as measure_ours
from tests.benchmarks.ppo_step_report import (
    OURS,
    floor_counts,
    floor_seconds,
    kept,
    rest,
    summarize,
    sweep_table,
    tables,
    target_lines,
    wrong_counts,
)
from tests.benchmarks.ppo_step_work import Measured, Work, resident_memory
from tests.models import write_tiny_model
from tests.tiny import tiny_tokenizer

PARTS = tuple(floor_counts("rto"))
GB = 10**9


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A prepared folder."""
    folder = tmp_path_factory.mktemp("ppo_step")
    work = Work(str(folder), tiny=True, prompts=4, prompt_tokens=10, new_tokens=5, microbatch=2, iterations=1)
    prepare(work)
    return work


def measured(seconds: list[float], peak: int, **more: Any) -> Measured:
    """What a contender with these iterations (the first is the warm-up) would give back."""
    tokens = {"prompt_tokens": [512] * len(seconds), "sampled_tokens": [768] * len(seconds)}
    phases = {phase: [value * part for value in seconds] for phase, part in zip(PHASES, (0.5, 0.2, 0.2), strict=True)}
    memory = {"peak": peak, "imports": GB // 2}
    return {
        "seconds": seconds,
        "phases": phases,
        "memory": memory,
        "versions": {},
        "trained_weights": 1,
        "sampling_logprobs": False,
        **tokens,
        **more,
    }


def floor_measured(generate: float, forward: float, backward: float) -> Measured:
    """A floor of two iterations whose parts of a kind take equally long; the warm-up takes a hundred times that."""
    each = {"generate": generate, "forward": forward, "backward": backward}
    result = measured([0.0, 0.0], GB)
    result["phases"] = {part: [100 * each[part.split("_")[0]], each[part.split("_")[0]]] for part in PARTS}
    for name in ("seconds", "trained_weights", "sampling_logprobs"):
        del result[name]
    return result


def test_what_a_contender_reads_is_what_was_written(tmp_path: Path) -> None:
    work = Work("somewhere", "a model", prompts=3, dtype="bfloat16")
    work.write(tmp_path / "work.json")
    assert Work.read(tmp_path / "work.json") == work


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_peak_memory_keeps_what_was_given_back() -> None:
    before, size = resident_memory(peak=False), 2**28
    block = torch.ones(size // 4)
    held = resident_memory(peak=False)
    del block
    # The kernel counts pages in batches, so a few megabytes are uncertain.
    assert held > before + 0.9 * size
    assert resident_memory(peak=False) < held - 0.9 * size
    assert resident_memory(peak=True) > before + 0.9 * size


@pytest.mark.parametrize("tokens", [5, 32, 33])
def test_prompts_have_exactly_so_many_tokens(tokens: int) -> None:
    tokenizer = tiny_tokenizer()
    texts = [
        text_of_length(lambda text: tokenizer(text)["input_ids"], tokens, random.Random(seed)) for seed in range(5)
    ]
    assert {len(tokenizer(text)["input_ids"]) for text in texts} == {tokens}
    assert all(word in WORDS for text in texts for word in text.split()) and len(set(texts)) > 1


def test_the_random_model_never_stops(work: Work) -> None:
    floor = Floor(work)
    tokens = floor.generate(torch.randint(3, 250, (8, 10)))
    with torch.no_grad():
        logprobs = floor.model(tokens).logits.log_softmax(-1)
    assert logprobs[..., floor.stop].max() < -15
    others = logprobs[..., torch.arange(logprobs.shape[-1]) != floor.stop]
    assert others.exp().max() < 0.5  # and nothing else of it is certain


def test_a_real_model_ends_on_a_special_token_that_is_not_used(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source", vocab_size=300)
    with pytest.raises(SystemExit, match="no unused special token"):
        link_model(source, tmp_path / "refused")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<|spare|>", special=True)])
    tokenizer.save_pretrained(source)
    work = Work(str(tmp_path), str(source), prompts=2, prompt_tokens=10, new_tokens=3, iterations=0)
    assert prepare(work)["stop"] == "<|spare|>"
    floor, spare = Floor(work), len(tokenizer) - 1
    assert floor.stop == spare and spare not in tokenizer.all_special_ids
    assert floor.model.get_base_model().config.pad_token_id == spare
    assert load_chat_tokenizer(backbone_settings(work)).stop_ids == (spare,)
    weights = [load_file(folder / "model.safetensors") for folder in (source, work.model)]
    assert all(torch.equal(weights[1][name], weight) for name, weight in weights[0].items())


def test_every_contender_does_the_same_work(work: Work) -> None:
    found = {name: [measure_ours(work, name)] for name in OURS}
    found["floor"] = [measure_floor(work)]
    assert wrong_counts(work, found) == []
    assert set(found["floor"][0]["phases"]) == set(PARTS)
    for name in OURS:
        phases = found[name][0]["phases"]
        assert tuple(phases) == PHASES
        inside = [sum(seconds) for seconds in zip(*phases.values(), strict=True)]
        assert all(0 < part <= whole for part, whole in zip(inside, found[name][0]["seconds"], strict=True))
    assert [found[name][0]["sampling_logprobs"] for name in OURS] == [True, False, True, True]
    # Adapters of policy and critic, and the critic's head with its bias.
    adapter = sum(weight.numel() for weight in Floor(work).model.parameters() if weight.requires_grad)
    assert found["rto"][0]["trained_weights"] == 2 * adapter + 64 + 1


def test_other_work_is_told() -> None:
    work = Work("", iterations=1)
    right, stopped = measured([1.0, 1.0], GB), measured([1.0, 1.0], GB, sampled_tokens=[768, 760])
    assert wrong_counts(work, {"rto": [right], "trl": [right]}) == []
    assert wrong_counts(work, {"rto": [right], "trl": [right, stopped]}) == [
        "trl has sampled tokens [768, 760] in its iterations, not 768 in each of 2."
    ]
    assert len(wrong_counts(work, {"rto": [measured([1.0], GB)]})) == 2


def test_the_warm_up_of_each_round_is_left_out() -> None:
    one = kept([measured([9.0, 1.0, 2.0], 2 * GB), measured([8.0, 3.0, 4.0], 3 * GB)])
    assert one["seconds"] == [1.0, 2.0, 3.0, 4.0]
    assert one["phases"]["rollout"] == [0.5, 1.0, 1.5, 2.0]
    assert one["memory"] == {"peak": 3 * GB, "imports": GB // 2}
    assert rest(one) == pytest.approx(0.25)


def test_the_floor_adds_up_its_parts() -> None:
    phases = floor_measured(10.0, 1.0, 4.0)["phases"]
    expected = {"rto": 10.0 + 5 * 1.0 + 2 * 4.0, "ppo": 10.0 + 4 * 1.0 + 2 * 4.0, "rto_shared": 10.0 + 4 * 1.0 + 4.0}
    for name, seconds in expected.items():
        assert floor_seconds(phases, floor_counts(name))[1:] == [seconds]
        assert floor_seconds(phases, floor_counts(name, sampled=True))[1:] == [seconds - 1.0]


def test_ratios_and_targets() -> None:
    summary = summarize(
        {
            "floor": [floor_measured(10.0, 1.0, 4.0)],
            "rto": [measured([50.0, 25.3, 27.0], 2 * GB, sampling_logprobs=True)],
            "rto_reread": [measured([50.0, 46.0], 2 * GB)],
            "trl": [measured([50.0, 30.0, 40.0], 8 * GB)],
            "rto_shared": [],
        }
    )
    assert summary["floor"]["rto"]["median"] == 23.0
    ratios = {(ratio["of"], ratio["to"]): ratio for ratio in summary["ratios"]}
    reread = {("rto_reread", "floor"), ("rto_reread", "trl")}
    assert set(ratios) == {("rto", "floor"), ("rto", "sampled floor"), ("rto", "trl")} | reread
    assert ratios["rto", "sampled floor"]["seconds"] == pytest.approx(26.15 / 22)
    assert ratios["rto_reread", "floor"]["seconds"] == 2.0
    assert ratios["rto", "floor"]["seconds"] == pytest.approx(26.15 / 23)
    assert ratios["rto", "floor"]["minimum_seconds"] == pytest.approx(1.1)
    assert ratios["rto", "trl"]["seconds"] == pytest.approx(26.15 / 35)
    assert ratios["rto", "trl"]["memory"] == 0.25
    assert [target["met"] for target in summary["targets"]] == [True, True, None, True]
    assert target_lines(summary).splitlines()[2:] == [
        "seconds of rto_shared / trl at most 0.6: not measured",
        "memory of rto / trl at most 0.4: 0.25, met",
    ]
    assert summarize({"rto": [measured([50.0, 40.0], GB)]})["ratios"] == []


def test_tables_have_a_cell_for_each_column() -> None:
    contenders = {"floor": [floor_measured(10.0, 1.0, 4.0)], "rto": [measured([50.0, 30.0], 2 * GB)]}
    summary = summarize({**contenders, "trl": [measured([50.0, 40.0], 8 * GB)]})
    text = tables(summary)
    for block in text.split("\n\n"):
        assert len({line.count("|") for line in block.splitlines()}) == 1
    assert "| rto | 30.00 | 30.00 | 15.00 | 6.00 | 6.00 | 3.00 | 2.00 | 0.50 | 0.00 |" in text
    assert "| floor of rto | 23.00 |" in text and "| rto / trl | 0.75 | 0.75 | 0.25 |" in text
    point = {"prompts": 16, "new_tokens": 48, "summary": summarize(contenders)}
    assert sweep_table([point]).splitlines()[-1] == (
        "| 16 | 48 | 30.00 | 39.1 | 15.00 | 6.00 | 6.00 | 23.00 | 1.30 | 2.00 |"
    )


def test_a_random_model_is_the_same_each_time(tmp_path: Path) -> None:
    shape = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    for name in "ab":
        write_random_model(tmp_path / name, shape)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
