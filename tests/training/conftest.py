"""Fixtures of the training tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from tiny import build_model, build_tokens


@pytest.fixture
def model():
    return build_model()


@pytest.fixture
def tokens():
    return build_tokens()


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny matrices: threads cost more than they bring, and the bits must not depend on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
