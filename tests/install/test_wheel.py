"""``pip install .`` as a user does it: built without torch, used away from the sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the tracked files in an isolated environment."""
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode == 0:
        for name in filter(None, listed.stdout.decode().split("\0")):
            if (ROOT / name).is_file():
                (source / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, source / name)
    else:  # a source archive, no checkout
        ignored = shutil.ignore_patterns(".venv", "build", "*.so", "__pycache__")
        shutil.copytree(ROOT, source, dirs_exist_ok=True, ignore=ignored)
    out = tmp_path_factory.mktemp("wheel")
    environment = {**os.environ, "SKBUILD_CMAKE_DEFINE": "L3EXT_CUDA=OFF"}
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(out), str(source)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = out.glob("l3ext-*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert len(tops) == 2, tops  # l3ext and its metadata
    assert any(name.startswith("l3ext/_C.") and name.endswith(".so") for name in names)
    for wanted in ("l3ext/py.typed", "l3ext/_C.pyi", "l3ext/models/__init__.py"):
        assert wanted in names
    assert any(name.endswith("LICENSE") for name in names)


def test_the_installed_package_works_outside_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = """
import sys, torch, l3ext
assert l3ext.__file__.startswith(sys.argv[1]), l3ext.__file__
allocation = l3ext.allocate([0, 1, 0, 1, 2, 0], vocab_size=3, total_rows=6)
layer = l3ext.L3Layer(8, 4, 8, allocation)
print(tuple(layer(torch.randn(2, 8), torch.tensor([2, 0])).shape), l3ext.has_cuda)
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "(2, 8) False"
