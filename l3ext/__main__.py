"""``python -m l3ext``: the command line without an installed script."""

from __future__ import annotations

from l3ext.cli import main

if __name__ == "__main__":
    main()
