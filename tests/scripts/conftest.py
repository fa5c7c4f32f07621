"""The scripts' modules are imported by plain names, as ``python scripts/<name>`` does."""

from __future__ import annotations

import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS / "demo")]
