"""Files and links that are there whole or not at all, whenever a process dies and whatever fills the disk."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from rto_lightning.errors import UserError

PARTIAL = ".partial"
"""Ends the name of what is still being written."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ROOM_IN_RUST = re.compile(r"\(os error (\d+)\)")  # safetensors tells it in words alone


@contextmanager
def written_whole(path: Path, mode: str = "wb", **settings: Any) -> Iterator[IO[Any]]:
    """A file to write to, which takes its place at `path` once it is complete and on the disk.

    Args:
        path: where it goes; a file that is there stays until then.
        mode: of `open`, as are further settings.

    Raises:
        UserError: if there is no room for it; nothing is left of it then.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open(mode, **settings) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        check_room(error, path)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Puts on the disk which names a folder has, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def link_to(link: Path, target: Path) -> None:
    """Makes `link` a link to a neighbour; at every moment it leads to the old target or to the new one.

    On a file system without links there is none afterwards.

    Raises:
        UserError: if a folder is in its place.
    """
    partial = link.with_name(link.name + PARTIAL)
    if link.is_dir() and not link.is_symlink():
        raise UserError(f"{link} is a folder that something else has written; let that write elsewhere, and remove it.")
    try:
        partial.unlink(missing_ok=True)
        partial.symlink_to(target.name)
        partial.replace(link)
    except OSError:
        link.unlink(missing_ok=True)
    sync_folder(link.parent)


def remove(path: Path) -> None:
    """Removes a file or a folder, in one step for whoever looks for that name."""
    if path.is_dir() and not path.is_symlink():
        partial = path.with_name(path.name + PARTIAL)
        path.replace(partial)
        shutil.rmtree(partial)
    else:
        path.unlink(missing_ok=True)


def check_room(error: BaseException, path: Path) -> None:
    """Raise UserError if an error, or what led to it, says that the disk of `path` has no room."""
    reason: BaseException | None = error
    while reason is not None:
        in_words = _NO_ROOM_IN_RUST.search(str(reason))
        number = reason.errno if isinstance(reason, OSError) else int(in_words[1]) if in_words else None
        if number in _NO_ROOM:
            free = shutil.disk_usage(existing_parent(path)).free / 2**20
            raise UserError(
                f"{path} could not be written ({os.strerror(number)}; {free:.0f} MiB are free there), and what was "
                "complete before is as it was; make room and give the command again, of a stage with --ckpt_path last."
            ) from error
        reason = reason.__cause__ or reason.__context__


def existing_parent(path: Path) -> Path:
    """The nearest folder above a path that exists."""
    return next(folder for folder in path.absolute().parents if folder.exists())
