"""Reinforced Token Optimization (RTO) for language models on PyTorch Lightning."""

__version__ = "0.1.0"
