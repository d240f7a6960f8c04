"""How commands begin and end."""

import argparse
import signal

import pytest

from rto_lightning.cli.command import make_folder, positive, run_command
from rto_lightning.errors import Stopped, UserError


def test_ctrl_c_ends_a_command_in_order():
    def run(options):
        raise KeyboardInterrupt

    with pytest.raises(Stopped) as stop:
        run_command(["a"], list, run)
    assert stop.value.exit_status == 130


def test_a_reader_who_has_enough_ends_a_command_silently(tmp_path, monkeypatch, capfd):
    def run(options):
        raise BrokenPipeError

    with (tmp_path / "out").open("w") as file, pytest.raises(SystemExit) as ended:
        monkeypatch.setattr("sys.stdout", file)
        run_command(["a"], list, run)
    assert ended.value.code == 128 + signal.SIGPIPE and capfd.readouterr().err == ""


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "", "\u0663", "many"])
def test_whole_numbers_above_0(text):
    assert positive("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match="is no whole number above 0"):
        positive(text)


def test_a_folder_that_cannot_be_is_named(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(UserError, match="cannot be made"):
            make_folder(path)
