"""An installed tree of the C library, for the tests that use it from outside."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
# The test extra brings cmake and ninja: they stand beside the interpreter.
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def run(*command, cwd=None, **environment):
    """The output of a command that succeeds."""
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout


def configure(source, build, *options):
    return run("cmake", "-S", source, "-B", build, "-G", "Ninja", *options)


@pytest.fixture(scope="session")
def cmake():
    if shutil.which("cmake", path=ENVIRONMENT["PATH"]) is None:
        pytest.skip("no cmake: pip install 'l3ext[test]'")


@pytest.fixture(scope="session")
def prefix(cmake, tmp_path_factory):
    """Where the library is installed, after it was moved there from where CMake put it."""
    build = ROOT / "build" / "cpp"  # of `make test-cpp`; else one that only these tests use
    if not (build / "build.ninja").exists():
        build = ROOT / "build" / "install"
        configure(ROOT, build, "-DL3EXT_CUDA=OFF")
    run("cmake", "--build", build, "--target", "l3ext_shared")
    parent = tmp_path_factory.mktemp("installed")
    run("cmake", "--install", build, "--prefix", parent / "first")
    return (parent / "first").rename(parent / "moved")


@pytest.fixture(scope="session")
def programs(prefix, tmp_path_factory):
    """The foreign project, built by find_package() against the installed tree."""
    build = tmp_path_factory.mktemp("foreign")
    configure(ROOT / "tests/install", build, f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", build)
    return build
