"""What a result file says of the machine and the code that made it."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import l3ext
from l3ext import _C


def _first_line(path: str, key: str) -> str:
    try:
        for line in Path(path).read_text().splitlines():
            if line.startswith(key):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return "unknown"


def _commit() -> str:
    """The commit of the checkout that this package is imported from, if it is one."""
    try:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe() -> dict[str, Any]:
    """Processor, cores, caches and versions, as JSON values."""
    cache = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return {
        "cpu": _first_line("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "last_level_cache": cache.read_text().strip() if cache.exists() else "unknown",
        "isa": _C.cpu_isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "l3ext": l3ext.__version__,
        "commit": _commit(),
    }
