"""Files that a reader sees whole or not at all."""

from __future__ import annotations

import os
import stat

import pytest

from l3ext._files import atomic_path


def test_writers_of_one_path_do_not_meet(tmp_path):
    path = tmp_path / "file"
    with atomic_path(path) as first:
        with atomic_path(path) as second:
            first.write_text("first")
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert os.listdir(tmp_path) == ["file"]


def test_a_device_keeps_its_place(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with (
        pytest.raises(OSError, match="expected a regular file or none") as caught,
        atomic_path(path),
    ):
        raise AssertionError("nothing is to be written")
    assert caught.value.filename == str(path)
    assert stat.S_ISFIFO(path.stat().st_mode)
    with pytest.raises(IsADirectoryError), atomic_path(tmp_path):
        raise AssertionError("nothing is to be written")
