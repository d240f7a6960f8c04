import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # on tensors as small as those of tests, threads wait for each other


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a tiny causal language model; not to be written to."""
    from tests.models import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
