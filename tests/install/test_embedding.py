"""The C library as other programs get it: installed, found, linked, taken into their builds."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest

from .conftest import ENVIRONMENT, ROOT, configure, run

HEADER = ROOT / "csrc/include/l3ext/l3ext.h"


def shared_library(prefix):
    (library,) = prefix.glob("lib*/**/libl3ext.so")
    return library


def test_it_exports_what_the_header_declares_and_nothing_else(prefix):
    declared = set(
        re.findall(r"^L3EXT_API [^;]*?\b(l3ext_\w+)\(", HEADER.read_text(), re.MULTILINE)
    )
    assert len(declared) > 15
    lines = run("nm", "-D", "--defined-only", shared_library(prefix)).splitlines()
    symbols = {line.split()[2].split("@")[0] for line in lines if line.split()[1] != "A"}
    assert symbols == declared


def test_its_soname_carries_the_abi_number(prefix):
    number = re.search(r"#define L3EXT_ABI_VERSION (\d+)", HEADER.read_text())[1]
    dynamic = run("readelf", "-d", shared_library(prefix))
    assert f"[libl3ext.so.{number}]" in dynamic
    assert "NODELETE" in dynamic  # dlclose() must not take the code away under its threads
    assert not re.search(r"RUNPATH|RPATH", dynamic)
    assert not re.search(r"NEEDED.*(python|torch|cuda)", dynamic)


def test_the_tree_is_whole_and_knows_no_folder_but_its_own(prefix):
    files = {str(path.relative_to(prefix)) for path in prefix.rglob("*") if path.is_file()}
    for wanted in (
        "include/l3ext/l3ext.h",
        "include/l3ext/l3ext.hpp",
        "include/l3ext/dlpack/dlpack.h",
        "share/licenses/l3ext/LICENSE",
        "share/licenses/l3ext/LICENSE.dlpack",
    ):
        assert wanted in files
    for path in prefix.rglob("*"):
        if path.suffix in {".cmake", ".pc", ".h", ".hpp"}:
            text = path.read_text()
            assert str(ROOT) not in text, path
            assert str(prefix.parent) not in text, path


@pytest.mark.parametrize("program", ["main_c", "main_cpp"])
def test_a_foreign_project_finds_it(programs, program):
    assert run(programs / program) == "good\n"


def test_another_version_is_not_found(prefix, tmp_path):
    command = ["cmake", "-S", ROOT / "tests/install", "-B", tmp_path, "-G", "Ninja"]
    options = [f"-DCMAKE_PREFIX_PATH={prefix}", "-DWANTED_VERSION=99.0"]
    result = subprocess.run([*command, *options], env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode != 0
    assert "99.0" in result.stderr


@pytest.mark.parametrize("document", ["README.md", "docs/embedding.md"])
def test_c_of_the_documents_compiles(prefix, tmp_path, document):
    blocks = re.findall(
        r"^```c\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL
    )
    assert blocks
    (tmp_path / "blocks.c").write_text("\n".join(blocks))
    warnings = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-pedantic", "-Werror"]
    run("cc", "-std=c99", *warnings, f"-I{prefix}/include", "-fsyntax-only", tmp_path / "blocks.c")


@pytest.mark.parametrize(("compiler", "source"), [("cc -std=c99", "c"), ("c++ -std=c++17", "cpp")])
def test_pkg_config_finds_it(prefix, tmp_path, compiler, source):
    if shutil.which("pkg-config") is None:
        pytest.skip("no pkg-config")
    (pc,) = prefix.rglob("l3ext.pc")
    flags = run("pkg-config", "--cflags", "--libs", "l3ext", PKG_CONFIG_PATH=str(pc.parent))
    assert "first" not in flags
    library = str(shared_library(prefix).parent)
    file = ROOT / f"tests/install/main.{source}"
    run(*compiler.split(), file, *flags.split(), "-o", tmp_path / "main")
    assert run(tmp_path / "main", LD_LIBRARY_PATH=library) == "good\n"


def test_a_project_takes_the_sources_into_its_build(cmake, tmp_path):
    """Compiles what includes the headers, not the library once more: that would take minutes."""
    options = [f"-DL3EXT_SOURCE={ROOT}", "-DL3EXT_CUDA=OFF", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    configure(ROOT / "tests/install", tmp_path, *options)
    objects = [
        f"CMakeFiles/{name}.dir/{name.replace('_', '.')}.o" for name in ("main_c", "main_cpp")
    ]
    run("ninja", *objects, cwd=tmp_path)
    commands = {
        entry["file"]: entry["command"]
        for entry in json.loads((tmp_path / "compile_commands.json").read_text())
    }
    (main,) = [command for file, command in commands.items() if file.endswith("main.c")]
    # What is said of our own sources stays with them.
    assert "-Wno-psabi" not in main
    assert "-fopenmp" not in main
    assert "-O3" not in main
    assert "-DNDEBUG" not in main  # nor is a build type chosen
    assert not any("csrc/python" in file or "tests/cpp" in file for file in commands)
