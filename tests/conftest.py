"""What every test starts from."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_random_numbers_every_run():
    # A relative bound on a difference of near-equal numbers can fail for one draw in a hundred:
    # a run must not depend on the draw.
    torch.manual_seed(0)
