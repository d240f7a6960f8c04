"""Cached log-probabilities of a preference set: which pair gets which, for any role."""

import json
from dataclasses import replace

import pytest
import torch

from rto_lightning.algorithms import masked_sum, token_rewards
from rto_lightning.data import PreferenceDataModule
from rto_lightning.modules import cached_pair_logprobs
from tests.models import make_backbone

ROLES = ("dpo", "reference")


@pytest.fixture
def backbone(tiny_model, roles):
    made = make_backbone(tiny_model)
    made.add_role("reference")
    made.add_role("dpo", roles["adapters", "dpo"])
    return made


def preferences(source, backbone, **options):
    data = PreferenceDataModule(train=str(source), **{"batch_size": 4, "bad_rows": "skip", **options})
    data.chat = backbone.chat
    data.setup("fit")
    return data


@pytest.fixture
def data(backbone, tmp_path):
    """Twelve rows of which one is bad and one has too long a prompt, so that rows and positions differ."""
    rows = [{"prompt": f"Say {n}", "chosen": "yes" * (n % 4 + 1), "rejected": "no" * (n % 3 + 1)} for n in range(12)]
    rows[2]["chosen"] = ""
    rows[5]["prompt"] = "long" * 100
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return preferences(path, backbone, max_prompt_tokens=100)


def test_every_batch_gets_what_its_forward_would_give(backbone, data, tmp_path):
    """In each order of the rows, for the role that carries the token rewards and for its reference."""
    cached = {role: cached_pair_logprobs(backbone, role, data.rows["train"], tmp_path / "cache") for role in ROLES}
    rewards, seen = [], set()
    for epoch in range(2):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            mask = batch.sequences.response_mask
            found = {role: cached[role].of(batch) for role in ROLES}
            for role in ROLES:
                expected, _ = backbone.token_logprobs(role, batch.sequences)
                torch.testing.assert_close(found[role], expected, rtol=0, atol=1e-12)
            rewards.append(masked_sum(token_rewards(*found.values(), mask, beta_1=1.0, clip=0.0), mask, dim=1))
            seen.update(batch.index.tolist())
    assert len(seen) > 4 and not seen & {2, 5} and max(seen) > 9
    chosen, rejected = torch.stack(rewards).chunk(2, dim=1)
    assert (chosen > rejected).float().mean() > 0.9  # what the role was trained on: yes, not no


def test_pair_is_found_by_its_row_in_the_data_set(backbone, data, tmp_path):
    cached = cached_pair_logprobs(backbone, "dpo", data.rows["train"], tmp_path / "cache")
    assert len(cached) == 10
    for row in data.rows["train"]:
        chosen, rejected = cached.pair(row.index)
        assert len(chosen) == len(row.chosen) and len(rejected) == len(row.rejected)
        assert torch.equal(cached.of(data.collate(backbone.chat)([row]))[0, : len(chosen)], chosen)
    with pytest.raises(KeyError):
        cached.pair(2)


def test_batch_of_other_pairs_is_refused(backbone, data, files, tmp_path):
    cached = cached_pair_logprobs(backbone, "reference", data.rows["train"], tmp_path / "cache")
    batch = next(iter(data.train_dataloader()))
    with pytest.raises(ValueError, match="row 99 of the batch is not among the pairs"):
        cached.of(replace(batch, index=torch.tensor([99, *batch.index[1:]])))
    with pytest.raises(ValueError, match="differ in length"):
        cached.of(replace(batch, index=batch.index.flip(0)))


def test_pairs_that_cannot_be_told_apart_are_refused(backbone, data, tmp_path):
    rows = data.rows["train"]
    with pytest.raises(ValueError, match="same index"):
        cached_pair_logprobs(backbone, "reference", [*rows, replace(rows[0], prompt=rows[1].prompt)], tmp_path)
