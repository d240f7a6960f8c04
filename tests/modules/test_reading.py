"""Reading in batches of like length gives what one batch gives, and computes less padding."""

import pytest
import torch

from rto_lightning.backbone import Sequences
from rto_lightning.modules.reading import TrajectoryReader, by_length
from rto_lightning.rewards import WeightedScores
from rto_lightning.rollout import Trajectory
from tests.models import make_backbone, randomize

PROMPTS = [[1, 40, 41, 42, 43, 44], [1, 50], [1, 60, 61, 62, 63, 64, 65, 66], [1, 70], [1, 80, 81]]
RESPONSES = [[70, 2], [80, 81, 82, 83, 84, 85, 86, 2], [90, 2], [91], [92, 93, 94]]


@pytest.fixture
def backbone(tiny_model):
    backbone = make_backbone(tiny_model)
    for name in ("policy", "critic"):
        backbone.add_role(name, trainable=True, scalar_head=True)
        randomize(backbone.trained_parameters(name))
    return backbone


@pytest.fixture
def trajectory():
    return Trajectory(Sequences.from_lists(PROMPTS, RESPONSES, pad_id=2), torch.zeros(5, dtype=torch.bool))


class Constant:
    """Scores that tell which rows were read together, and in which order."""

    name = "constant"

    def __init__(self, takes_all):
        self.takes_all = takes_all
        self.calls = []

    def score(self, prompts, trajectory):
        self.calls.append(prompts)
        return torch.tensor([float(prompt) for prompt in prompts])


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_results_do_not_depend_on_the_batches(backbone, trajectory, batch_size):
    sequences, reader = trajectory.sequences, TrajectoryReader(backbone, batch_size)
    logprobs, entropy, values = backbone.token_logprobs_and_values("policy", "critic", sequences, 0.7, True)
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(reader.logprobs("policy", trajectory, 0.7), logprobs, **close)
    for found, expected in zip(
        reader.logprobs_entropy_and_values("policy", "critic", trajectory, 0.7),
        (logprobs, entropy, values),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, **close)
    torch.testing.assert_close(reader.values("critic", trajectory), backbone.token_values("critic", sequences), **close)


def test_scores_come_back_in_order_and_their_prompts_go_along(backbone, trajectory):
    local, elsewhere = Constant(takes_all=False), Constant(takes_all=True)
    sources = WeightedScores([local, elsewhere], [1.0, 1.0], normalize=False)
    scores = TrajectoryReader(backbone, 2).scores(sources, trajectory, ["0", "1", "2", "3", "4"])
    assert scores.tolist() == [[float(n), float(n)] for n in range(5)]
    assert local.calls == [["1", "2"], ["0", "4"], ["3"]]  # 10 and 10 tokens, 8 and 6, 3
    assert elsewhere.calls == [["0", "1", "2", "3", "4"]]


@torch.no_grad()
def test_rows_of_like_length_share_a_forward_without_the_gap_between_prompt_and_response(backbone, trajectory):
    """In one rectangle of the widest prompt and the widest response these rows would be 5 x 16 tokens."""
    shapes = []
    hook = (
        backbone.models["base"]
        .get_decoder()
        .embed_tokens.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(inputs[0].shape)))
    )
    TrajectoryReader(backbone, 2).logprobs("policy", trajectory)
    hook.remove()
    assert shapes == [(2, 10), (2, 8), (1, 3)]


def test_longest_first_and_otherwise_as_they_came(trajectory):
    assert by_length(trajectory.sequences).tolist() == [1, 2, 0, 4, 3]
    assert by_length(trajectory.sequences, torch.tensor([3, 2, 1])).tolist() == [2, 1, 3]
