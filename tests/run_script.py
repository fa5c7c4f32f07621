"""Python code that needs a process of its own: it forks, or changes limits."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap


def run_script(*parts):
    """Run them one after the other in one process, which finds the modules that this one does."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    script = "".join(textwrap.dedent(part) for part in parts)
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, env=environment)
