"""Reads the machine code of the built kernels and fails where it is not what was meant.

    python scripts/check_sass.py build/cpp/libl3ext.a

Prints a line for every kernel and architecture (registers, static shared memory, stack,
and how often the instructions occur that matter), then what is wrong. What every kernel must and
must not contain stands in EXPECTATIONS. Needs cuobjdump, nvdisasm and c++filt, but no GPU:
`pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm` brings the first two where there is no CUDA
toolkit.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

#: Name in the table to the instructions that it counts.
INSTRUCTIONS = {
    "HMMA": re.compile(r"HMMA\."),  # matrix product of 16-bit operands
    "LDG.128": re.compile(r"LDG\.(.*\.)?128(\.|$)"),  # 16 bytes of global memory into registers
    "LDGSTS": re.compile(r"LDGSTS\."),  # global to shared memory in the background (cp.async)
    "LDL": re.compile(r"LDL(\.|$)"),  # from and to local memory: spills, arrays indexed at run time
    "STL": re.compile(r"STL(\.|$)"),
}


@dataclasses.dataclass(frozen=True)
class Expectation:
    """What the machine code of some kernels must be like."""

    kernels: str  #: regular expression, found in the demangled name
    max_registers: int  #: per thread; 65536 / (max_registers * threads of a block) blocks fit
    contains: tuple[str, ...] = ()  #: of INSTRUCTIONS
    lacks: tuple[str, ...] = ()  #: of INSTRUCTIONS; local memory, none may have


_HALF = r"<l3ext::(BFloat16|Float16)\b"
#: Every kernel is held to each expectation that matches it, and every expectation to matching some.
EXPECTATIONS = (
    # Two blocks of 256 threads on a multiprocessor; one where queries are staged in shared memory.
    Expectation(
        rf"::(forward_kernel{_HALF}, 1, false|query_gradients_kernel{_HALF}, 1, false, false)>",
        128,
        ("HMMA", "LDG.128"),
    ),
    Expectation(rf"::query_gradients_kernel{_HALF}, 1, false, true>", 255, ("HMMA", "LDG.128")),
    Expectation(
        rf"::(forward|query_gradients)_kernel{_HALF}, [48], true\b",
        255,
        ("HMMA", "LDG.128", "LDGSTS"),
    ),
    # Rows come into shared memory by themselves; two blocks, or one would wait for them.
    Expectation(rf"::slab_kernel{_HALF}", 128, ("HMMA", "LDGSTS")),
    Expectation(r"::slab_kernel<float\b", 255, ("LDGSTS",), ("HMMA",)),
    Expectation(rf"::decode_kernel{_HALF}", 128, ("HMMA", "LDG.128")),
    Expectation(rf"::row_gradients_kernel{_HALF}", 255, ("HMMA", "LDG.128")),
    # The matrix units would round float32 operands.
    Expectation(
        r"::(forward|decode|query_gradients|row_gradients)_kernel<float\b",
        255,
        ("LDG.128",),
        ("HMMA",),
    ),
    # One block of 1024 threads.
    Expectation(r"::(plan|schedule)_in_block_kernel\b", 64),
    # Two blocks of 512 threads, beside which attention's blocks find room.
    Expectation(r"::fetch_(blocks|step)_kernel\b", 64, ("LDG.128",)),
    Expectation(r"::claim_slots_kernel\b", 64),
)


@dataclasses.dataclass
class Kernel:
    """One kernel for one architecture."""

    name: str  #: demangled
    architecture: str  #: as sm_90a
    registers: int = 0
    shared: int = 0  #: static shared memory, bytes
    stack: int = 0  #: bytes
    size: int = 0  #: instructions
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    @property
    def short_name(self) -> str:
        """Without return type, namespaces and parameters."""
        return re.sub(r"\(.*", "", self.name).replace("void ", "", 1).replace("l3ext::", "")


def parse_resources(lines: Iterable[str]) -> Iterator[tuple[str, str, int, int, int]]:
    """(name, architecture, registers, shared, stack) from ``cuobjdump --dump-resource-usage``."""
    architecture = name = ""
    for line in lines:
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (.+):$", line):
            name = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            yield name, architecture, int(match[1]), int(match[3]), int(match[2])


def parse_sass(lines: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """(name, architecture, instruction) of every instruction in ``cuobjdump --dump-sass``."""
    architecture = name = ""
    for line in lines:
        if match := re.match(r"\s*code for (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (.+)$", line):
            name = match[1]
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", line):
            yield name, architecture, match[1]


_OURS = re.compile(r"(void )?l3ext::")


def read_kernels(resources: Iterable[str], sass: Iterable[str]) -> list[Kernel]:
    """Our kernels (not CUB's) in both outputs of cuobjdump, with names demangled already.

    Raises:
        ValueError: a kernel of which the one knows and the other does not.
    """
    kernels: dict[tuple[str, str], Kernel] = {}
    for name, architecture, registers, shared, stack in parse_resources(resources):
        if _OURS.match(name):
            kernels[name, architecture] = Kernel(name, architecture, registers, shared, stack)
    for name, architecture, instruction in parse_sass(sass):
        if not _OURS.match(name):
            continue
        if (name, architecture) not in kernels:
            raise ValueError(f"{name} ({architecture}): in the SASS, not in the resource usage")
        kernel = kernels[name, architecture]
        kernel.size += 1
        for label, pattern in INSTRUCTIONS.items():
            kernel.counts[label] += bool(pattern.match(instruction))
    for kernel in kernels.values():
        if kernel.size == 0:
            raise ValueError(f"{kernel.name} ({kernel.architecture}): no SASS")
    return sorted(kernels.values(), key=lambda kernel: (kernel.name, kernel.architecture))


def check(kernels: list[Kernel], expectations: Iterable[Expectation] = EXPECTATIONS) -> list[str]:
    """What is wrong with the kernels, a sentence each; nothing: all is as meant."""
    wrong = []
    built_for = sorted({kernel.architecture for kernel in kernels})
    for expectation in expectations:
        matching = [kernel for kernel in kernels if re.search(expectation.kernels, kernel.name)]
        for architecture in built_for or ["any architecture"]:
            if not any(kernel.architecture == architecture for kernel in matching):
                wrong.append(f"no kernel for {architecture} matches {expectation.kernels}")
        for kernel in matching:
            wrong += [
                f"{kernel.short_name} ({kernel.architecture}): {fault}"
                for fault in _faults(kernel, expectation)
            ]
    return wrong


def _faults(kernel: Kernel, expectation: Expectation) -> Iterator[str]:
    if kernel.registers > expectation.max_registers:
        yield f"expected at most {expectation.max_registers} registers, got {kernel.registers}"
    spills = {label: kernel.counts[label] for label in ("LDL", "STL") if kernel.counts[label]}
    if kernel.stack or spills:
        counts = "".join(f", {count} {label}" for label, count in spills.items())
        yield f"expected no local memory, got a stack of {kernel.stack} bytes{counts}"
    for label in expectation.contains:
        if not kernel.counts[label]:
            yield f"expected {label}, got none"
    for label in expectation.lacks:
        if kernel.counts[label]:
            yield f"expected no {label}, got {kernel.counts[label]}"


def format_table(kernels: list[Kernel]) -> str:
    """One line per kernel and architecture."""
    header = ["kernel", "for", "registers", "shared", "stack", "size", *INSTRUCTIONS]
    texts = [header]
    for k in kernels:
        usage = (k.registers, k.shared, k.stack, k.size, *(k.counts[i] for i in INSTRUCTIONS))
        texts.append([k.short_name, k.architecture, *map(str, usage)])
    widths = [max(len(row[i]) for row in texts) for i in range(len(header))]

    def aligned(row: list[str]) -> str:
        cells = zip(row, widths, strict=True)
        return "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(cells))

    return "\n".join(map(aligned, texts))


def tool_environment() -> dict[str, str]:
    """The environment, with the wheels' tools on PATH behind those of a toolkit.

    Raises:
        FileNotFoundError: no cuobjdump, nvdisasm or c++filt.
    """
    wheels = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin"))
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *map(str, wheels)])
    for tool in ("cuobjdump", "nvdisasm", "c++filt"):
        if shutil.which(tool, path=path) is None:
            raise FileNotFoundError(f"{tool}: not found on PATH or in this Python's nvidia wheels")
    return {**os.environ, "PATH": path}


def dump(what: str, path: Path, environment: dict[str, str]) -> list[str]:
    """Lines of ``cuobjdump <what>`` with names demangled."""
    path.stat()  # cuobjdump takes a missing file for an empty one in some versions
    raw = subprocess.run(
        ["cuobjdump", what, str(path)], env=environment, capture_output=True, text=True, check=True
    ).stdout
    return subprocess.run(
        ["c++filt"], env=environment, input=raw, capture_output=True, text=True, check=True
    ).stdout.splitlines()


def main(arguments: list[str] | None = None) -> int:
    """0: as meant; 1: not as meant; 2: could not look."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, nargs="+", help="object file, archive or module")
    files: list[Path] = parser.parse_args(arguments).file
    kernels = []
    try:
        environment = tool_environment()
        for file in files:
            resources = dump("--dump-resource-usage", file, environment)
            kernels += read_kernels(resources, dump("--dump-sass", file, environment))
    except subprocess.CalledProcessError as error:
        print(f"check_sass: {error}: {error.stderr.strip()}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"check_sass: {error}", file=sys.stderr)
        return 2
    print(format_table(kernels))
    wrong = check(kernels)
    for sentence in wrong:
        print(f"wrong: {sentence}")
    print(f"check_sass: {len(kernels)} kernels, {len(wrong)} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
