"""Files that a reader sees whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path: str | bytes | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` to write to; rename it over ``path`` on success.

    Any exception in the body (disk full, Ctrl-C) removes the temporary file and leaves the old
    file as it was. The content is flushed to the device before the rename.
    """
    target = Path(os.fsdecode(path))
    if not target.name:  # "", ".", "/"
        raise IsADirectoryError(errno.EISDIR, "expected a file's path", os.fspath(path))
    temporary = target.with_name(f"{target.name}.tmp.{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
