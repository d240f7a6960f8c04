"""The index of a sharded checkpoint; `tests/faults/test_trust_in_runs.py` loads hostile ones."""

import enum
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint

from rto_lightning.backbone.shard_files import INDEX_FILE, load_shards
from rto_lightning.errors import UserError


class NamingPickler(pickle.Pickler):
    """Pickles members of enumerations by name, as Python 3.11.0 to 3.11.3 do."""

    def __init__(self, file: io.BytesIO, changed: str | None = None) -> None:
        super().__init__(file)
        self.changed = changed

    def reducer_override(self, obj: object) -> Any:
        if isinstance(obj, enum.Enum):
            return getattr, (type(obj), self.changed or obj.name)
        return NotImplemented


def save_shards(folder: Path, changed: str | None = None) -> None:
    distributed_checkpoint.save({"weight": torch.arange(3.0)}, checkpoint_id=folder, no_dist=True)
    index = pickle.loads((folder / INDEX_FILE).read_bytes())
    file = io.BytesIO()
    NamingPickler(file, changed).dump(index)
    assert b"getattr" in file.getvalue()
    (folder / INDEX_FILE).write_bytes(file.getvalue())


def test_an_index_with_enumerations_by_name_is_read(tmp_path: Path) -> None:
    save_shards(tmp_path / "step=1.ckpt")
    state = {"weight": torch.zeros(3)}
    load_shards(state, tmp_path / "step=1.ckpt", no_dist=True)
    assert state["weight"].tolist() == [0.0, 1.0, 2.0]


def test_an_index_gets_no_other_attributes(tmp_path: Path) -> None:
    save_shards(tmp_path / "step=1.ckpt", changed="__subclasses__")
    with pytest.raises(UserError, match="holds getattr of <enum '_MEM_FORMAT_ENCODING'>, which could run code"):
        load_shards({"weight": torch.zeros(3)}, tmp_path / "step=1.ckpt", no_dist=True)
