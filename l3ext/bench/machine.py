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


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _commit() -> str:
    """The commit of the checkout that this package is imported from, if it is one.

    A copy without its history says it in L3EXT_COMMIT.
    """
    folder = str(Path(__file__).parent)
    return os.environ.get("L3EXT_COMMIT") or _output(
        ["git", "-C", folder, "describe", "--always", "--dirty"]
    )


def _cuda(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    fields = "driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw"
    query = [
        "nvidia-smi",
        f"--query-gpu={fields}",
        "--format=csv,noheader",
        f"--id=GPU-{properties.uuid}",
    ]
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory_bytes": properties.total_memory,
        "gpu_cache_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        **dict(zip(fields.split(","), _output(query).split(", "), strict=False)),
    }


def describe(device: torch.device | None = None) -> dict[str, Any]:
    """Processor, cores, caches and versions, as JSON values; of a CUDA device too if it is one."""
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
        **(_cuda(device) if device is not None and device.type == "cuda" else {}),
    }
