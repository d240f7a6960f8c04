"""Judging what was trained."""

from rto_lightning.evaluation.ranking import PairRecords, ranking_accuracies

__all__ = ["PairRecords", "ranking_accuracies"]
