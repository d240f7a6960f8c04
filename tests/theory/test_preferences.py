import torch

from rto_lightning.theory import (
    TokenMDP,
    linear_rewards,
    path_sums,
    random_features,
    response_tokens,
    sample_preferences,
    token_features,
)


def test_labels_follow_bradley_and_terry() -> None:
    """Token rewards label pairs by their sums (equation 3.1)."""
    generator = torch.Generator().manual_seed(0)
    rewards = (torch.tensor([[0.0, 0.5]]).double(), torch.tensor([[0.0, 1.0], [-1.0, 0.3]]).double())
    sums = path_sums(rewards)
    first, second = torch.zeros(100_000, dtype=torch.int64), torch.ones(100_000, dtype=torch.int64)
    preferences = sample_preferences(sums, first, second, generator)
    share = (preferences.chosen == 1).double().mean()
    # Five standard deviations of a share of 100,000 are 0.008.
    torch.testing.assert_close(share, torch.sigmoid(sums[1] - sums[0]), rtol=0, atol=8e-3)
    assert bool((preferences.chosen + preferences.rejected == 1).all())


def test_a_clear_preference_is_never_turned_round() -> None:
    scores = torch.tensor([0.0, 1000.0]).double()
    first, second = torch.tensor([0, 1]), torch.tensor([1, 0])
    preferences = sample_preferences(scores, first, second, torch.Generator().manual_seed(0))
    assert preferences.chosen.tolist() == [1, 1]
    assert preferences.rejected.tolist() == [0, 0]


def test_token_features_give_every_token_its_own_reward() -> None:
    mdp = TokenMDP(3, 3)
    theta = torch.tensor([0.3, -0.2], dtype=torch.float64)
    sums = path_sums(linear_rewards(token_features(mdp), theta))
    by_token = torch.tensor([0.0, 0.3, -0.2], dtype=torch.float64)
    torch.testing.assert_close(sums, by_token[response_tokens(mdp, torch.arange(27))].sum(dim=1))


def test_random_features_are_on_the_unit_sphere() -> None:
    features = random_features(TokenMDP(2, 3), 5, torch.Generator().manual_seed(0))
    assert [tuple(layer.shape) for layer in features] == [(1, 2, 5), (2, 2, 5), (4, 2, 5)]
    for layer in features:
        torch.testing.assert_close(layer.norm(dim=-1), torch.ones(layer.shape[:-1], dtype=torch.float64))
