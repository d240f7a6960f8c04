"""Judging what was trained: answers to benchmarks, judges, win rates."""
