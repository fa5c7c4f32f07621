"""Files that a reader sees whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from l3ext._checks import file_path

_numbers = itertools.count()


@contextlib.contextmanager
def atomic_path(path: str | bytes | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` to write to; rename it over ``path`` on success.

    Any exception in the body (disk full, Ctrl-C) removes the temporary file and leaves the old
    file as it was. The content is flushed to the device before the rename.
    """
    target = Path(file_path(path))
    if not target.name or target.is_dir():  # "", ".", "/"
        raise IsADirectoryError(errno.EISDIR, "expected a file's path", os.fspath(path))
    if target.exists() and not target.is_file():  # the rename would take /dev/null's place
        raise OSError(
            errno.EINVAL, "expected a regular file or none, got a special one", os.fspath(path)
        )
    # Of its own for each: several threads may write the same file at once.
    temporary = target.with_name(f"{target.name}.tmp.{os.getpid()}.{next(_numbers)}")
    try:
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
