"""The JSONL log of a run: one line per optimizer step, none twice and none missing.

A checkpoint records how long the log was; resuming from it cuts off what was written after.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any


class StepLog:
    """Appends records to ``path``, which is first cut to ``length`` bytes.

    Raises:
        OSError: the file is shorter than ``length``: it is not the log of this run.
    """

    def __init__(self, path: Path, *, length: int) -> None:
        self._stream = open(path, "ab")  # noqa: SIM115  (closed by __exit__)
        size = self._stream.seek(0, os.SEEK_END)
        if size < length:
            self._stream.close()
            raise OSError(
                errno.EIO, f"expected the run's log, at least {length} bytes, got {size}", str(path)
            )
        self._stream.truncate(length)
        self._stream.seek(length)

    def __enter__(self) -> StepLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stream.close()

    def append(self, record: dict[str, Any]) -> None:
        """Write one line; a reader sees it at once."""
        self._stream.write(json.dumps(record).encode() + b"\n")
        self._stream.flush()

    def sync(self) -> int:
        """Flush to the device; the log's length in bytes, for the checkpoint."""
        os.fsync(self._stream.fileno())
        return self._stream.tell()


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a log, in order; an unfinished last line (a killed writer's) is left out."""
    lines = Path(path).read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]
