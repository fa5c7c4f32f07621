"""The demo's modules are imported by plain names, as ``python scripts/demo`` does."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts/demo"))
