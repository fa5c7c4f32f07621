"""Truncated, corrupt and foreign token files are refused before anything is mapped."""

import json
import os
import resource
import signal

import numpy as np
import pytest
from test_token_file import chunk

from l3ext.training import TokenFile, write_token_file


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "tokens"
    write_token_file(path, [chunk(np.arange(1000) % 300)], vocab_size=300)
    return path


@pytest.mark.parametrize("size", [0, 7, 4095, 4096, 5000])
def test_truncated(path, size):
    os.truncate(path, size)
    with pytest.raises(OSError, match="not an intact token file") as caught:
        TokenFile.open(path)
    assert caught.value.filename == str(path)


def test_longer_than_it_says(path):
    with open(path, "ab") as stream:
        stream.write(b"x")
    with pytest.raises(OSError, match=r"expected \d+ bytes, got"):
        TokenFile.open(path)


def test_one_flipped_bit(path):
    raw = bytearray(path.read_bytes())
    for place in (4096 + 900, len(raw) - 3):  # an id, an offset
        damaged = bytearray(raw)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(OSError, match="checksum"):
            TokenFile.open(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.pop("tokens"),
        lambda h: h.pop("__metadata__"),
        lambda h: h["__metadata__"].update(format="l3ext.tokens.9"),
        lambda h: h["__metadata__"].update(vocab_size="many"),
        lambda h: h["tokens"].update(dtype="F32"),
        lambda h: h["tokens"].update(data_offsets=[0, 1 << 40], shape=[1 << 39]),
        lambda h: h["tokens"].update(data_offsets=[-8, 0], shape=[4]),
        lambda h: h["offsets"].update(shape=[]),
        lambda h: h["offsets"].update(data_offsets=None),
    ],
)
def test_headers_that_lie(path, change):
    raw = path.read_bytes()
    header = json.loads(raw[8:4096])
    change(header)
    path.write_bytes(raw[:8] + json.dumps(header).encode().ljust(4088) + raw[4096:])
    with pytest.raises(OSError, match="not an intact token file"):
        TokenFile.open(path)


def test_foreign_and_missing(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(4000))
    with pytest.raises(OSError, match="header"):
        TokenFile.open(tmp_path / "x.npy")
    with pytest.raises(FileNotFoundError):
        TokenFile.open(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        TokenFile.open(tmp_path)


def test_disk_full_leaves_the_old_file(path):
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_token_file(path, [chunk(np.zeros(10_000, np.int64))], vocab_size=300)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["tokens"]
