"""Pictures of commands: matplotlib where it is installed, files that are whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def import_pyplot(option: str) -> Any:
    """``matplotlib.pyplot``, drawing into files.

    Raises:
        RuntimeError: it is not installed; names the extra.
    """
    try:
        import matplotlib
    except ImportError:
        raise RuntimeError(
            f"{option}: needs matplotlib, which the extra l3ext[plots] brings"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def check_format(option: str, path: Path) -> None:
    """See before the work that ``save_figure`` will know the suffix."""
    known = import_pyplot(option).figure().canvas.get_supported_filetypes()
    import_pyplot(option).close()
    if _format(path) not in known:
        raise ValueError(f"{option}: expected a file of {', '.join(sorted(known))}, got {path}")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure in the format of the path's suffix, png where it has none, and close it."""
    from matplotlib import pyplot

    from l3ext._files import atomic_path

    # Letters stay letters in an svg: it is smaller, and can be searched.
    with atomic_path(path) as temporary, pyplot.rc_context({"svg.fonttype": "none"}):
        figure.savefig(temporary, format=_format(path), dpi=150)
    pyplot.close(figure)


def _format(path: Path) -> str:
    return path.suffix.lstrip(".").lower() or "png"
