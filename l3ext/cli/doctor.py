"""``l3ext doctor``: what this machine has, and what follows."""

from __future__ import annotations

import errno
import mmap
import os
import platform
import resource
import shutil
import tempfile
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from l3ext.cli._output import JsonOption, format_bytes, print_json

_BLOCK = 4096
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pyarrow", "matplotlib")


@dataclass(frozen=True)
class Fact:
    """One thing found, and its consequence."""

    name: str
    value: str
    meaning: str


def doctor(
    directory: Annotated[
        Path,
        typer.Option(help="Where table files would lie; O_DIRECT is tried here."),
    ] = Path(),
    as_json: JsonOption = False,
) -> None:
    """Say what this machine has, and what follows for l3ext.

    \b
    Examples:
      l3ext doctor
      l3ext doctor --directory /mnt/nvme --json
    """
    if not directory.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "expected a directory", str(directory))
    facts = [
        *_versions(),
        *_processor(),
        *_cuda(),
        _memory(),
        _memlock(),
        _direct_io(directory),
        _io_uring(),
        _shared_memory(),
    ]
    if as_json:
        print_json([asdict(fact) for fact in facts])
        return
    width = max(len(fact.name) for fact in facts)
    for fact in facts:
        typer.echo(f"{fact.name:<{width}}  {fact.value}")
        typer.echo(f"{'':<{width}}    {fact.meaning}")


def _versions() -> list[Fact]:
    import l3ext

    found = []
    missing = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    meaning = "all there"
    if missing:
        extras = {"pyarrow": "Parquet needs l3ext[data]", "matplotlib": "plots need l3ext[plots]"}
        meaning = f"without {', '.join(missing)}: " + "; ".join(
            extras.get(name, f"{name} is required") for name in missing
        )
    return [
        Fact(
            "l3ext",
            f"{l3ext.__version__} on Python {platform.python_version()}, "
            f"{platform.system()} {platform.release()} {platform.machine()}",
            f"installed in {Path(l3ext.__file__).parent}",
        ),
        Fact("packages", ", ".join(found), meaning),
    ]


def _processor() -> list[Fact]:
    import torch

    from l3ext import _C

    cores = len(os.sched_getaffinity(0))
    return [
        Fact(
            "instruction sets",
            ", ".join(_C.cpu_isas()),
            f"the CPU kernels run as {_C.cpu_isa()!r}; L3EXT_CPU_ISA forces another of these",
        ),
        Fact(
            "cores",
            f"{cores} usable of {os.cpu_count()}",
            f"torch computes with {torch.get_num_threads()} threads; a fetch of tables uses "
            f"further ones, which mostly wait",
        ),
    ]


def _cuda() -> list[Fact]:
    import torch

    from l3ext import _C

    built = Fact(
        "CUDA in l3ext",
        "yes" if _C.has_cuda else "no",
        "its CUDA parts are there"
        if _C.has_cuda
        else "the CPU path alone: build it where nvcc is found, or with L3EXT_CUDA=ON",
    )
    version_file = Path("/proc/driver/nvidia/version")
    driver = version_file.read_text().splitlines()[0] if version_file.is_file() else "none"
    devices = _C.cuda_devices()
    names = [
        f"{device['name']} (compute {'.'.join(map(str, device['compute_capability']))}, "
        f"{format_bytes(device['memory_bytes'])})"
        for device in devices
    ]
    return [
        built,
        Fact(
            "CUDA driver",
            driver,
            "devices can be reached" if driver != "none" else "no GPU can be reached from here",
        ),
        Fact(
            "CUDA devices",
            "; ".join(names) or "none",
            f"torch {torch.__version__} "
            + ("sees CUDA" if torch.cuda.is_available() else "computes on the CPU"),
        ),
    ]


def _memory() -> Fact:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit_file = Path("/sys/fs/cgroup/memory.max")
    limit = limit_file.read_text().strip() if limit_file.is_file() else "max"
    usable = total if limit == "max" else min(total, int(limit))
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return Fact(
        "memory",
        f"{format_bytes(usable)}, {format_bytes(available)} of the machine's free now",
        "tier ram holds whole tables here; a larger model's tables want tier disk",
    )


def _memlock() -> Fact:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = limit == resource.RLIM_INFINITY
    return Fact(
        "memlock limit",
        "unlimited" if unlimited else format_bytes(limit),
        "tables of any size can be pinned for a GPU"
        if unlimited
        else "tables larger than this may not be pinned for a GPU (ulimit -l raises it); "
        "the CPU path pins nothing",
    )


def _direct_io(directory: Path) -> Fact:
    failure = try_direct_io(directory)
    place = str(directory.resolve())
    if failure is None:
        return Fact(
            "O_DIRECT", f"works in {place}", "tier disk reads past the page cache from here"
        )
    return Fact(
        "O_DIRECT",
        f"does not work in {place}: {failure}",
        "tier disk reads through the page cache here: correct, and it takes memory for it",
    )


def _io_uring() -> Fact:
    from l3ext import _C

    failure = _C.why_no_uring()
    if not failure:
        return Fact("io_uring", "works", "tier disk keeps many reads on their way by it")
    return Fact("io_uring", failure, "tier disk reads by threads with pread instead")


def try_direct_io(directory: Path) -> str | None:
    """Write a block in ``directory`` and read it back with O_DIRECT; None, or why that failed."""
    content = bytes(range(256)) * (_BLOCK // 256)
    try:
        with (
            tempfile.NamedTemporaryFile(dir=directory, prefix=".l3ext-doctor-") as file,
            mmap.mmap(-1, _BLOCK) as block,  # page-aligned, as O_DIRECT demands
        ):
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            descriptor = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
            try:
                count = os.preadv(descriptor, [block], 0)
            finally:
                os.close(descriptor)
            if count != _BLOCK or block[:] != content:
                return f"read {count} of {_BLOCK} bytes, or others than were written"
    except OSError as error:
        return error.strerror or str(error)
    return None


def _shared_memory() -> Fact:
    path = Path("/dev/shm")
    if not path.is_dir():
        return Fact("/dev/shm", "none", "tables cannot be shared between processes there")
    usage = shutil.disk_usage(path)
    return Fact(
        "/dev/shm",
        f"{format_bytes(usage.free)} free of {format_bytes(usage.total)}",
        "bounds what lies there: a table file put there is read at the speed of memory",
    )
