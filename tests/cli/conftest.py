"""A corpus, and a small trained run for the commands that need one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from command_line import SIZES, invoke


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A text file of a few hundred short lines."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    words = [
        *("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while"),
        *("seven", "wizards", "brew", "tea"),
    ]
    lines = [
        " ".join(words[(i * 7 + j * j) % len(words)] for j in range(3 + i % 9)) for i in range(400)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def run_directory(tmp_path_factory, corpus):
    """A finished run of ``l3ext train``."""
    output = tmp_path_factory.mktemp("runs") / "run"
    torch.set_num_threads(1)
    result = invoke("train", corpus, "--output", output, "--steps", 8, *SIZES)
    assert result.exit_code == 0, result.output
    return output
