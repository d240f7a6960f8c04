import errno
import os

import pytest

from rto_lightning.errors import UserError
from rto_lightning.runs.files import check_room, link_to, remove, written_whole


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with written_whole(path, "w") as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_what_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyError), written_whole(path, "w") as file:
        file.write("new")
        raise KeyError
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_told_in_one_sentence(tmp_path):
    (tmp_path / "file.partial").symlink_to("/dev/full")
    told = r"file could not be written \(No space left on device; \d+ MiB are free there\)"
    with pytest.raises(UserError, match=told), written_whole(tmp_path / "file") as file:
        file.write(b"something")
    assert not list(tmp_path.iterdir())


def test_libraries_that_tell_a_full_disk_in_words(tmp_path):
    with pytest.raises(UserError, match="No space left on device"):
        check_room(RuntimeError("I/O error: No space left on device (os error 28)"), tmp_path / "file")
    check_room(RuntimeError("I/O error: Permission denied (os error 13)"), tmp_path / "file")
    check_room(OSError(errno.EACCES, "denied"), tmp_path / "file")


def test_a_link_moves_on(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
        link_to(tmp_path / "last", tmp_path / name)
        assert (tmp_path / "last").is_symlink() and (tmp_path / "last").read_text() == name


def test_a_link_does_not_take_the_place_of_a_folder(tmp_path):
    (tmp_path / "last/shards").mkdir(parents=True)
    with pytest.raises(UserError, match="last is a folder that something else has written"):
        link_to(tmp_path / "last", tmp_path / "a")
    assert (tmp_path / "last/shards").exists()


def test_without_links_there_is_none(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError

    link_to(tmp_path / "last", tmp_path / "a")
    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    link_to(tmp_path / "last", tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_files_folders_and_nothing_are_removed(tmp_path):
    (tmp_path / "folder/inner").mkdir(parents=True)
    (tmp_path / "file").touch()
    for name in ("folder", "file", "nothing"):
        remove(tmp_path / name)
    assert not list(tmp_path.iterdir())
