"""The one law of the house, held by reading the sources and the built module."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import l3ext
from l3ext import _C

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path
    for path in (ROOT / "csrc").rglob("*")
    if path.suffix in {".cpp", ".hpp", ".cu", ".cuh", ".h", ".inl"}
)
# What each folder of csrc may include of the others; "l3ext" is what stands in include/.
ALLOWED = {
    "include": {"l3ext"},
    "core": {"core"},
    "lzw": {"core", "lzw"},
    "attention": {"core", "attention"},
    "runtime": {"core", "runtime"},
    "capi": {"core", "lzw", "attention", "runtime", "capi", "l3ext"},
    "python": {"core", "lzw", "attention", "runtime", "python"},
}


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def test_there_are_sources_to_read():
    assert len(SOURCES) > 20


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_folder_includes_only_what_it_may(path):
    folder = path.relative_to(ROOT / "csrc").parts[0]
    for name in includes(path):
        first = name.split("/")[0]
        assert first not in {"torch", "ATen", "c10"}, f"{name}: no native file includes torch"
        if first in ALLOWED or first == "l3ext":
            assert first in ALLOWED[folder], f"{folder} must not include {name}"
        if first in {"pybind11", "Python.h"}:
            assert folder == "python", f"{name}: only csrc/python knows Python"


def test_public_headers_stand_alone():
    headers = [path for path in SOURCES if path.relative_to(ROOT / "csrc").parts[0] == "include"]
    assert headers
    for path in headers:
        for name in includes(path):
            assert name.startswith("l3ext/") or re.fullmatch(r"[a-z_]+(\.h)?", name), name


def test_the_built_module_needs_no_torch():
    module = _C.__file__
    needed = subprocess.run(["ldd", module], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"libtorch|libc10|libcudart|libcuda\.", needed), needed
    symbols = Path(module).read_bytes()
    for name in (b"_ZN2at", b"_ZN3c10", b"_ZN5torch"):
        assert name not in symbols


def test_no_library_code_prints_or_exits():
    banned = r"std::cout|std::cerr|(?<!sn)printf\s*\(|\babort\s*\(|(?<!_)\bexit\s*\("
    for path in SOURCES:
        found = re.search(banned, path.read_text())
        assert found is None, f"{path.name}: {found[0]}"


def test_no_source_file_is_long():
    python = [*(ROOT / "l3ext").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    for path in [*SOURCES, *python]:
        assert len(path.read_text().splitlines()) <= 600, f"{path}: split it"


def test_versions_agree():
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{l3ext.__version__}"' in project
    cmake = (ROOT / "CMakeLists.txt").read_text()
    assert f"project(l3ext VERSION {l3ext.__version__} " in cmake
