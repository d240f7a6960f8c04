"""The quickstart's grammar, tokenizer, tiny model and data files."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rto_lightning.errors import UserError
from rto_lightning.quickstart.grammar import (
    MAX_REVIEW_TOKENS,
    PRODUCTS,
    TELLING_ADJECTIVES,
    TONE_OF_ADJECTIVE,
    VAGUE_ADJECTIVES,
    all_requests,
    parse_request,
    sample_review,
    vocabulary,
    words,
)
from rto_lightning.quickstart.jsonl import read_jsonl
from rto_lightning.quickstart.model import PAD, TinyModelSettings, tiny_tokenizer, write_tiny_model
from rto_lightning.quickstart.world import write_world

FILES = (
    "demonstrations_train.jsonl",
    "demonstrations_validation.jsonl",
    "prompts_train.jsonl",
    "prompts_validation.jsonl",
    "prompts_test.jsonl",
)
SMALL = TinyModelSettings(hidden_size=16, intermediate_size=32, layers=1, heads=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    write_world(directory, seed=3, train_reviews=300, validation_reviews=50, model=SMALL)
    return directory


def test_requests_are_distinct_and_can_be_read_back() -> None:
    requests = all_requests()
    assert len(requests) == 768
    assert len({request.messages[0]["content"] for request in requests}) == len(requests)
    assert all(parse_request(request.messages) == request for request in requests)


def test_a_prompt_from_elsewhere_is_refused() -> None:
    with pytest.raises(UserError, match="'tell me a joke' is not one of the quickstart's"):
        parse_request([{"role": "user", "content": "tell me a joke"}])
    with pytest.raises(UserError, match="is not one of the quickstart's"):
        parse_request([])


def test_a_prompt_that_asks_for_an_aspect_the_product_lacks_is_refused() -> None:
    assert "handle" not in PRODUCTS["camera"]
    with pytest.raises(UserError):
        parse_request([{"role": "user", "content": "write a kind review of the small camera and its handle"}])


def test_no_adjective_has_two_tones() -> None:
    pools = [*TELLING_ADJECTIVES.values(), *VAGUE_ADJECTIVES.values()]
    assert len(TONE_OF_ADJECTIVE) == sum(len(pool) for pool in pools) == 24


def test_reviews_vary_in_length_within_bounds() -> None:
    rng = random.Random(0)
    requests = all_requests()
    lengths = [len(words(sample_review(rng.choice(requests), rng))) for _ in range(3000)]
    assert min(lengths) == 1
    assert max(lengths) <= MAX_REVIEW_TOKENS
    assert 12.0 < sum(lengths) / len(lengths) < 16.0
    assert sum(length <= 6 for length in lengths) > 200
    assert sum(length >= 24 for length in lengths) > 200


def test_reviews_answer_their_prompt() -> None:
    rng = random.Random(1)
    requests = all_requests()
    named, own = 0, 0
    for _ in range(1000):
        request = rng.choice(requests)
        for word in words(sample_review(request, rng)):
            if word in PRODUCTS:
                assert word == request.product
            if any(word in aspects for aspects in PRODUCTS.values()):
                named += 1
                own += word in request.aspects
    # 80% by choice, and half of the rest by chance.
    assert own / named == pytest.approx(0.89, abs=0.04)


def test_every_text_tokenizes_without_unknown_tokens_and_comes_back() -> None:
    tokenizer = tiny_tokenizer()
    rng = random.Random(2)
    for request in all_requests():
        review = sample_review(request, rng)
        ids = tokenizer(review, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.convert_ids_to_tokens(ids) == words(review)
        assert tokenizer.decode(ids) == review
        prompt = tokenizer.apply_chat_template(request.messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer.unk_token_id not in tokenizer(prompt, add_special_tokens=False)["input_ids"]


def test_chat_template_ends_every_turn_with_the_stop() -> None:
    tokenizer = tiny_tokenizer()
    messages = [{"role": "user", "content": "the lens"}, {"role": "assistant", "content": "is great ."}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == "<|user|>the lens<|end|><|assistant|>is great .<|end|>"
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 2
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert rendered.startswith(prompt)


def test_tokenizer_covers_the_vocabulary_once() -> None:
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) == len(vocabulary()) + 5
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
    assert tokenizer.pad_token == PAD
    assert tokenizer.bos_token is None


def test_model_folder_loads_with_the_auto_classes(world: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(world / "model", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(world / "model", local_files_only=True)
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    logits = model(input_ids=torch.tensor([[3, 5, 6]])).logits
    assert logits.shape == (1, 3, len(tokenizer))
    assert not (world / "model" / "pytorch_model.bin").exists()


def test_model_is_decided_by_its_seed(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_tiny_model(tmp_path / name, seed, SMALL)
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert weights["a"] == weights["b"] != weights["c"]
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_model_is_not_overwritten_and_its_size_is_checked(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, 1, SMALL)
    with pytest.raises(UserError, match="already holds a model"):
        write_tiny_model(tmp_path, 1, SMALL)
    with pytest.raises(UserError, match="hidden_size 20 is not a multiple of twice the 4 heads"):
        write_tiny_model(tmp_path / "b", 1, TinyModelSettings(hidden_size=20, heads=4))


def test_splits_are_disjoint_and_complete(world: Path) -> None:
    prompts = {
        split: {row["prompt"][0]["content"] for row in read_jsonl(world / f"prompts_{split}.jsonl")}
        for split in ("train", "validation", "test")
    }
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["train"] & prompts["test"]
    assert not prompts["validation"] & prompts["test"]
    assert {split: len(members) for split, members in prompts.items()} == {
        "train": 544,
        "validation": 96,
        "test": 128,
    }
    for split, count in (("train", 300), ("validation", 50)):
        rows = read_jsonl(world / f"demonstrations_{split}.jsonl")
        assert len(rows) == count
        assert {row["prompt"][0]["content"] for row in rows} <= prompts[split]
        assert all(row["response"].strip() for row in rows)


def test_world_is_decided_by_its_seed(world: Path, tmp_path: Path) -> None:
    write_world(tmp_path / "same", seed=3, train_reviews=300, validation_reviews=50, model=SMALL)
    write_world(tmp_path / "other", seed=4, train_reviews=300, validation_reviews=50, model=SMALL)
    for name in FILES:
        assert (tmp_path / "same" / name).read_bytes() == (world / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (world / name).read_bytes()


def test_world_refuses_to_overwrite(world: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    with pytest.raises(UserError, match="is there already"):
        write_world(world, seed=5, model=SMALL)
    assert before == {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    (tmp_path / "prompts_test.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match=r"prompts_test\.jsonl is there already"):
        write_world(tmp_path, model=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts_test.jsonl"]


def test_world_keeps_some_prompts_for_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave some of the grammar's 768 prompts"):
        write_world(tmp_path, validation_prompts=500, test_prompts=268)


def test_jsonl_errors_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(UserError, match=r"rows\.jsonl is not there"):
        read_jsonl(path)
    path.write_text('{"a": 1}\n\n[2]\n')
    with pytest.raises(UserError, match=r"rows\.jsonl, line 3, is not a JSON object"):
        read_jsonl(path)
