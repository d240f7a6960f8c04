"""Reading a sharded checkpoint of `torch.distributed.checkpoint` without running what is in it.

Its index, `.metadata`, is a pickle, and so are the entries that are no tensors; the library unpickles both, whatever
they hold. Here an index may hold nothing but descriptions of tensors, and an entry nothing but what `weights_only` lets
through. Files that the index names must lie beside it.
"""

import io
import pickle
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, Metadata, ReadItem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, StorageMeta

from rto_lightning.backbone.model_files import check_folder, check_names
from rto_lightning.errors import UserError, first_line

INDEX_FILE = ".metadata"
"""Index of a sharded checkpoint, as the library names it."""


def read_index(path: Path) -> Metadata:
    """The index of a sharded checkpoint.

    Args:
        path: its folder.

    Raises:
        UserError: if it is damaged, holds anything but descriptions of tensors, or names files elsewhere.
    """
    check_folder(path)
    try:
        with (path / INDEX_FILE).open("rb") as file:
            index = _IndexUnpickler(file).load()
        names = {entry.relative_path for entry in index.storage_data.values()}
    except Exception as error:  # a damaged pickle raises anything
        raise _unreadable(path, error) from error
    check_names(names, path / INDEX_FILE)
    assert isinstance(index, Metadata)
    return index


def load_shards(states: dict[str, Any], path: Path, no_dist: bool = False) -> None:
    """Read a sharded checkpoint into tensors and other values, in place, as `torch.distributed.checkpoint.load`.

    Args:
        states: what is asked for, by the names in the checkpoint.
        path: its folder.
        no_dist: read in this process alone.

    Raises:
        UserError: as :func:`read_index`; and if a shard is damaged, or lacks what is asked for.
    """
    read_index(path)  # so that what is wrong with it is told as it is
    try:
        distributed_checkpoint.load(states, storage_reader=_Reader(path), planner=_Planner(), no_dist=no_dist)
    except CheckpointException as error:
        reasons = [wrapped[0] for wrapped in error.failures.values()]
        raise _unreadable(path, reasons[0] if reasons else error) from error
    except (OSError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: BaseException) -> UserError:
    return UserError(
        f"the checkpoint {path} cannot be read ({first_line(error)}); it is damaged or was not written by a stage "
        "here, so name another one."
    )


class _IndexUnpickler(pickle.Unpickler):
    """Knows the classes of an index and no others."""

    _CLASSES: ClassVar[dict[str, frozenset[str]]] = {
        "torch.distributed.checkpoint.metadata": frozenset(
            (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        "torch.distributed.checkpoint.filesystem": frozenset(("_StorageInfo",)),
        "torch.serialization": frozenset(("_get_layout",)),
        "torch": frozenset(("Size",)),
        "pathlib": frozenset(("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
        "pathlib._local": frozenset(("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
        "collections": frozenset(("OrderedDict",)),
    }

    def find_class(self, module: str, name: str) -> Any:
        """The class, or the data type, of a name in the file."""
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in self._CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its index holds {module}.{name}, which could run code")


def _memory_format(kind: Any, name: str) -> Any:
    """What `getattr` may do in an index: Python 3.11.0 to 3.11.3 pickle a member of an enumeration by its name."""
    if kind is _MEM_FORMAT_ENCODING and name in _MEM_FORMAT_ENCODING.__members__:
        return _MEM_FORMAT_ENCODING[name]
    raise pickle.UnpicklingError(f"its index holds getattr of {kind!r}, which could run code")


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """As the library's, through `read_index`."""
        index = read_index(Path(self.path))
        if index.storage_meta is None:
            index.storage_meta = StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """As the library's, which would unpickle anything, but for what `weights_only` lets through."""
        harmless = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), harmless)
        harmless.seek(0)
        super().load_bytes(read_item, harmless)
