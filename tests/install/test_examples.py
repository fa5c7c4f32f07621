"""Every program in examples/ is short, and does what it says."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest

from .conftest import ROOT, run
from .test_embedding import shared_library

EXAMPLES = sorted(path for path in (ROOT / "examples").rglob("*") if path.is_file())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_it_is_short(path):
    assert len(path.read_text().splitlines()) <= 60


def test_c_and_numpy_without_torch(programs, prefix, tmp_path):
    """The C example writes the file that the other one reads."""
    file = tmp_path / "tables.safetensors"
    lines = run(programs / "example_c", file).splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["layer 0", "layer 1"]
    # Two layers of tokens 3, 14, 15, 999, which own 4, 3, 4, 4 rows of 96 float32.
    assert lines[2] == f"30 rows, {30 * 96 * 4} bytes fetched"

    script = ROOT / "examples/python/numpy_without_torch.py"
    arguments = [str(script), str(shared_library(prefix)), str(file)]
    code = f"""
import runpy, sys
sys.modules["torch"] = sys.modules["l3ext"] = None  # to import them fails
sys.argv = {arguments}
runpy.run_path(sys.argv[0])
"""
    output = run(sys.executable, "-c", code, cwd=tmp_path).splitlines()
    assert [line.split()[0] for line in output] == ["3", "14", "15"]
    rows = np.array([(i % 17 - 8) / 8 for i in range(2500 * 96)]).reshape(2500, 96)[6:10]
    weights = np.exp(rows[:, :64].sum(1))
    expected = weights / weights.sum() @ rows[:, 64:68]
    printed = np.array(output[0].split("[")[1].rstrip("]").split(), float)
    np.testing.assert_allclose(printed, expected, atol=1e-6)


def test_cpp(programs):
    counts, refused = run(programs / "example_cpp").splitlines()
    steps, hits, tokens = re.match(r"(\d+) steps, (\d+) of (\d+) tokens", counts).groups()
    assert int(steps) == 4
    assert 0 < int(hits) < int(tokens) <= 64
    assert refused == "refused: token_ids[0]: expected an id in [0, 1000), got 1000"


def test_offloaded_generate(tmp_path):
    script = ROOT / "examples/python/offloaded_generate.py"
    output = run(sys.executable, script, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert output.splitlines()[-1] == "the same text: True"
    assert (tmp_path / "tables.safetensors").exists()
