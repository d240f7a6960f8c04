import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a tiny causal language model; not to be written to."""
    from tests.models import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
