"""Token rewards of texts, against log-probabilities that are read one response at a time."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from rto_lightning.backbone import PolicyBackbone, Sequences
from rto_lightning.backbone.fingerprints import adapter_fingerprint
from rto_lightning.data.formats import Preference
from rto_lightning.errors import MissingInputError, UserError
from rto_lightning.inspection import TokenRewardReader, open_dpo_role, open_scores
from tests.inspection.made import question
from tests.models import make_backbone, randomize, write_tiny_classifier, write_tiny_model
from tests.roles import save_random_role

PROMPTS = [question("Why?"), question("How long is it?"), question("Hm")]
RESPONSES = ["Because. So!", "é", "No."]


@pytest.fixture(scope="module")
def backbone(tiny_model: Path) -> PolicyBackbone:
    made = make_backbone(tiny_model)
    made.add_role("reference")
    made.add_role("dpo", trainable=True)
    randomize(made.trained_parameters("dpo"))
    return made


def log_ratios(backbone: PolicyBackbone, prompt: list[dict[str, str]], ids: list[int]) -> torch.Tensor:
    """By plain forward passes over one response."""
    start = backbone.chat.encode_prompt(prompt)
    row = torch.tensor([start + ids])
    found = []
    for role in ("dpo", "reference"):
        with torch.no_grad(), backbone.play(role) as model:
            model.eval()
            logprobs = model(input_ids=row).logits.double().log_softmax(-1)
        found.append(logprobs[0, len(start) - 1 : -1].gather(1, row[0, len(start) :, None]).squeeze(1))
    return found[0] - found[1]


def test_rewards_are_log_ratios_of_each_token(backbone: PolicyBackbone) -> None:
    read = TokenRewardReader(backbone, batch_size=2).responses(PROMPTS, RESPONSES)
    for prompt, text, response in zip(PROMPTS, RESPONSES, read, strict=True):
        assert response.prompt == prompt and response.response == text
        assert response.token_ids == backbone.chat.encode_response(text, 99)
        expected = log_ratios(backbone, prompt, response.token_ids)
        torch.testing.assert_close(torch.tensor(response.rewards, dtype=torch.float64), expected, rtol=0, atol=1e-9)
        assert response.cumulative[-1] == pytest.approx(response.total)
        assert expected.abs().max() > 0.01
    assert [i for i, ends in enumerate(read[0].sentence_ends) if ends] == [7, 11]
    assert read[1].texts == ["", "é", "<|im_end|>"]


def test_scale_and_clip(backbone: PolicyBackbone) -> None:
    plain = TokenRewardReader(backbone).responses(PROMPTS, RESPONSES)
    clipped = TokenRewardReader(backbone, beta_1=0.5, clip=0.02).responses(PROMPTS, RESPONSES)
    expected = [[max(-0.02, min(0.02, 0.5 * reward)) for reward in response.rewards] for response in plain]
    assert [response.rewards for response in clipped] == [pytest.approx(rewards) for rewards in expected]


def test_a_truncated_response_has_no_stop(backbone: PolicyBackbone) -> None:
    reader = TokenRewardReader(backbone)
    whole, cut = reader.responses(PROMPTS[:1] * 2, ["Yes"] * 2, [False, True])
    assert whole.special == [False] * 3 + [True] and cut.special == [False] * 3
    assert cut.rewards == pytest.approx(whole.rewards[:3])
    short = TokenRewardReader(backbone, max_response_tokens=2).responses(PROMPTS[:1], ["Yes"])[0]
    assert short.texts == ["Y", "e"]
    with pytest.raises(UserError, match="response 2 has no tokens"):
        reader.responses(PROMPTS[:2], ["Yes", ""], [False, True])


def test_rewards_of_a_pair_are_the_same_up_to_the_divergence(backbone: PolicyBackbone) -> None:
    pair = TokenRewardReader(backbone).pairs([Preference(PROMPTS[0], "It is so", "It is not so")])[0]
    assert pair.first_divergence == len("It is ")
    assert pair.chosen.rewards[:6] == pytest.approx(pair.rejected.rewards[:6], abs=1e-9)
    assert pair.chosen.rewards[6] != pytest.approx(pair.rejected.rewards[6], abs=1e-6)
    assert pair.margin == pytest.approx(pair.chosen.total - pair.rejected.total)


def test_roles_that_are_not_there(backbone: PolicyBackbone) -> None:
    with pytest.raises(UserError, match="no role dpo_2"):
        TokenRewardReader(backbone, dpo="dpo_2")


def test_saved_roles_are_opened_with_their_base(tiny_model: Path, tmp_path: Path) -> None:
    dpo = save_random_role(tiny_model, tmp_path / "stage" / "role", "dpo")
    reward = save_random_role(tiny_model, tmp_path / "reward" / "role", "reward")
    for name in (dpo, str(tmp_path / "stage")):
        opened = open_dpo_role(name)
        read = TokenRewardReader(opened, open_scores(opened, str(tmp_path / "reward"))).responses(PROMPTS, RESPONSES)
        assert any(abs(reward) > 0.01 for response in read for reward in response.rewards)
        assert len({response.score for response in read}) == 3
    # Outside of the backbone's own units nothing is done to a score.
    alone = make_backbone(tiny_model, dtype="float32")
    alone.add_role("reward", reward, scalar_head=True)
    sequences_of = [
        (alone.chat.encode_prompt(p), alone.chat.encode_response(r, 99))
        for p, r in zip(PROMPTS, RESPONSES, strict=True)
    ]
    with torch.no_grad():
        expected = [
            float(alone.sequence_scores("reward", Sequences.from_lists([p], [r], alone.chat.pad_id)))
            for p, r in sequences_of
        ]
    assert [response.score for response in read] == pytest.approx(expected, abs=1e-5)


def test_outside_models(tiny_model: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other", seed=1)
    classifier = write_tiny_classifier(tmp_path / "classifier")
    with pytest.raises(UserError, match="--base_model"):
        open_dpo_role(str(other))
    opened = open_dpo_role(str(other), base_model=str(tiny_model))
    scores = open_scores(opened, str(classifier))
    response = TokenRewardReader(opened, scores).responses(PROMPTS[:1], RESPONSES[:1])[0]
    assert response.score is not None and max(map(abs, response.rewards)) > 0.01
    with pytest.raises(MissingInputError):
        open_dpo_role(str(tmp_path / "nothing"))
    # An adapter of another program has neither a card nor a tokenizer.
    adapter = Path(save_random_role(tiny_model, tmp_path / "adapter", "dpo"))
    own = TokenRewardReader(open_dpo_role(str(adapter))).responses(PROMPTS, RESPONSES)
    for path in adapter.iterdir():
        if not path.name.startswith("adapter_"):
            path.unlink()
    bare = open_dpo_role(str(adapter), base_model=str(tiny_model))
    assert TokenRewardReader(bare).responses(PROMPTS, RESPONSES) == own
    # A model against itself has no reward.
    same = TokenRewardReader(open_dpo_role(str(tiny_model), base_model=str(tiny_model)))
    assert set(same.responses(PROMPTS[:1], RESPONSES[:1])[0].rewards) == {0.0}


def test_a_role_trained_against_an_adapter_needs_it(tiny_model: Path, tmp_path: Path) -> None:
    other = save_random_role(tiny_model, tmp_path / "other", "policy")
    dpo = save_random_role(tiny_model, tmp_path / "dpo", "dpo")
    sft = shutil.copytree(dpo, tmp_path / "sft")
    for folder, changes in ((dpo, {"init_fingerprint": adapter_fingerprint(sft)}), (sft, {"role": "policy"})):
        card = json.loads((Path(folder) / "role.json").read_text())
        (Path(folder) / "role.json").write_text(json.dumps({**card, **changes}))
    with pytest.raises(UserError, match="trained against an SFT adapter"):
        open_dpo_role(dpo)
    with pytest.raises(UserError, match="another SFT adapter"):
        open_dpo_role(dpo, reference=other)
    # Both have the same weights: their log-ratio is 0.
    read = TokenRewardReader(open_dpo_role(dpo, reference=str(sft))).responses(PROMPTS[:1], RESPONSES[:1])
    assert read[0].rewards == pytest.approx([0.0] * len(read[0].rewards), abs=1e-5)


def test_a_response_has_the_place_that_its_prompt_leaves_in_the_context(backbone: PolicyBackbone) -> None:
    reader = TokenRewardReader(backbone)
    [whole, cut] = reader.responses([PROMPTS[0]] * 2, ["So.", "So. " * 99])
    assert whole.special[-1] and not cut.special[-1]
    assert len(backbone.chat.encode_prompt(PROMPTS[0])) + len(cut.token_ids) == 256
    with pytest.raises(UserError, match=r"the prompt of response 2 has \d+ tokens, and the model takes 256"):
        reader.responses([PROMPTS[0], question("Why? " * 60)], ["So.", "So."])
