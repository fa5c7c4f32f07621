"""Python code that needs a process of its own: it forks, or changes limits."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap


def run_script(*parts):
    """Run them one after the other in one process, which finds the modules that this one does.

    Its temporary files are gone afterwards: a script that forks cannot remove them itself.
    """
    script = "".join(textwrap.dedent(part) for part in parts)
    with tempfile.TemporaryDirectory() as temporary:
        environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": temporary
        }  # fmt: skip
        subprocess.run([sys.executable, "-c", script], check=True, timeout=120, env=environment)
