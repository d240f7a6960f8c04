import pytest
import torch

from rto_lightning.algorithms import PairRecords, pair_accuracy, ranking_accuracies


def test_a_pair_is_ranked_right_wrong_or_tied() -> None:
    chosen, rejected = torch.tensor([2.0, -1.0, 0.5]).double(), torch.tensor([1.0, 1.0, 0.5]).double()
    assert pair_accuracy(chosen, rejected).tolist() == [1.0, 0.0, 0.5]
    assert pair_accuracy(chosen, rejected).dtype == torch.float64


def test_shares_of_pairs_that_a_score_ranks_as_labelled() -> None:
    records = PairRecords()
    # Right, a tie and, in a batch of its own, wrong; the answers of the second pair alone differ by more than 15%.
    records.add(torch.tensor([0, 1]), torch.tensor([100, 100, 90, 84]), {"score": torch.tensor([2.0, 1.0, 1.0, 1.0])})
    records.add(torch.tensor([2]), torch.tensor([40, 40]), {"score": torch.tensor([0.0, 3.0])})
    figures = ranking_accuracies(records)
    assert (figures["pairs"], figures["pairs_like_length"]) == (3, 2)
    assert figures["score/accuracy"] == pytest.approx(0.5)
    assert figures["score_like_length/accuracy"] == pytest.approx(0.5)
    # Correct is 1, 0.5, 0: CR1 is 3/2 * (0.25 + 0.25) / 9, the usual standard error of three observations.
    half_width = 1.96 * (1 / 12) ** 0.5
    assert figures["score/low"] == pytest.approx(0.5 - half_width)
    assert figures["score/high"] == pytest.approx(0.5 + half_width)


def test_one_prompt_gives_no_interval() -> None:
    records = PairRecords()
    records.add(torch.tensor([7, 7]), torch.tensor([10, 10, 90, 90]), {"score": torch.tensor([2.0, 2.0, 1.0, 1.0])})
    figures = ranking_accuracies(records)
    assert figures["score/accuracy"] == 1.0
    assert figures["score/low"] != figures["score/low"]  # nan
    assert "score_like_length/accuracy" not in figures


def test_like_length_is_a_share_of_the_longer_answer_of_each_pair() -> None:
    records = PairRecords()
    # 15% of 100 exactly; 25% of 40, though little beside the other pair's 100; the same answer twice.
    characters = torch.tensor([100, 40, 50, 85, 30, 50])
    scores = torch.tensor([3.0, 1.0, 2.0, 2.0, 2.0, 1.0])  # right, wrong, right
    records.add(torch.tensor([0, 1, 2]), characters, {"score": scores})
    figures = ranking_accuracies(records)
    assert (figures["pairs"], figures["pairs_like_length"]) == (3, 2)
    assert figures["score/accuracy"] == pytest.approx(2 / 3)
    assert figures["score_like_length/accuracy"] == 1.0
