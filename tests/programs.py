"""Programs of this repository that are not in the package, as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def load_benchmark(name):
    """The module that ``benchmarks/<name>.py`` is; its main() has not run."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclasses look for their own module
    spec.loader.exec_module(module)
    return module
