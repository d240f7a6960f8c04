"""Looking at token rewards: which tokens of a response a DPO model likes."""

from rto_lightning.inspection.correlation import (
    Agreement,
    Correlation,
    agreement,
    clustered_correlation,
    score_correlation,
)
from rto_lightning.inspection.examples import Answer, load_examples, reward_examples
from rto_lightning.inspection.iteration import TokenTerms, token_terms, token_terms_text
from rto_lightning.inspection.opening import open_dpo_role, open_scores
from rto_lightning.inspection.page import TokenRewardPage
from rto_lightning.inspection.reading import TokenRewardReader, rewarded_responses
from rto_lightning.inspection.responses import RewardedPair, RewardedResponse
from rto_lightning.inspection.tables import (
    RewardMean,
    by_position,
    by_sentence_place,
    by_token,
    extreme_tokens,
    margin_after_divergence,
    means_text,
    pair_ranking,
)

__all__ = [
    "Agreement",
    "Answer",
    "Correlation",
    "RewardMean",
    "RewardedPair",
    "RewardedResponse",
    "TokenRewardPage",
    "TokenRewardReader",
    "TokenTerms",
    "agreement",
    "by_position",
    "by_sentence_place",
    "by_token",
    "clustered_correlation",
    "extreme_tokens",
    "load_examples",
    "margin_after_divergence",
    "means_text",
    "open_dpo_role",
    "open_scores",
    "pair_ranking",
    "reward_examples",
    "rewarded_responses",
    "score_correlation",
    "token_terms",
    "token_terms_text",
]
