"""One seed for a run, from which every draw gets its own."""

import hashlib
import os
import random

import numpy as np
import torch


def run_seed(seed: int | None) -> int:
    """The given seed, else that of `seed_everything`, else 0."""
    return seed if seed is not None else int(os.environ.get("PL_GLOBAL_SEED", "0"))


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that any other parts would make another one."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_generators(*parts: int | str) -> None:
    """Seeds the global generators of Python, NumPy and PyTorch, for code that draws from them, such as a reward."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
