"""Checks of single arguments, whose errors name them."""

from __future__ import annotations

import operator
import os
import reprlib
from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np

import l3ext

_Item = TypeVar("_Item")
_LIMIT = 2**63


def integer(value: object, argument: str, least: int | None = None) -> int:
    """``value`` as an int: an int of Python's or NumPy's, or whatever else is one.

    Raises:
        TypeError: 1e9, True and the like.
        ValueError: less than ``least``.
    """
    if type(value) is int:  # nearly all; compiled code can follow
        found = value
    else:
        try:
            if isinstance(value, bool):
                raise TypeError
            found = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(f"{argument}: expected an int, got {reprlib.repr(value)}") from None
    if least is not None and found < least:
        raise ValueError(f"{argument}: expected {least} or more, got {found}")
    return found


def whole_numbers(**options: object) -> dict[str, int]:
    """Options that a native object counts with.

    Raises:
        TypeError: 1e9 and the like, naming it.
        ValueError: more than 64 bits hold.
    """
    numbers = {name: integer(value, name) for name, value in options.items()}
    for name, number in numbers.items():
        if abs(number) >= _LIMIT:
            raise ValueError(f"{name}: expected less than 2**63, got {number}")
    return numbers


def check_flags(**options: object) -> None:
    """TypeError unless each is True or False, naming the one that is neither."""
    for name, value in options.items():
        if not isinstance(value, (bool, np.bool_)):
            raise TypeError(f"{name}: expected True or False, got {reprlib.repr(value)}")


def number(value: object, argument: str) -> float:
    """``value`` as a float: a number of Python's or NumPy's, or a tensor of one element.

    Raises:
        TypeError: None, text and the like.
    """
    if type(value) is float:
        return value
    if not isinstance(value, (bool, str, bytes)):
        try:
            return float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            pass
    raise TypeError(f"{argument}: expected a number, got {reprlib.repr(value)}")


def file_path(value: object, argument: str = "path") -> str:
    """``value`` as the system's calls take it: text, bytes or an ``os.PathLike``.

    Raises:
        TypeError: 5, None and the like.
    """
    try:
        return os.fsdecode(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"{argument}: expected a path (str, bytes or os.PathLike), got {reprlib.repr(value)}"
        ) from None


def check_kind(value: object, kind: type[Any], argument: str) -> None:
    """TypeError unless it is one."""
    if not isinstance(value, kind):
        raise TypeError(f"{argument}: expected {_name(kind)}, got {type(value).__name__}")


def all_of(values: Iterable[_Item], kind: type[Any], argument: str) -> list[_Item]:
    """``values``, one after the other, as a list.

    Raises:
        TypeError: they cannot be gone through, or one is not of this kind.
    """
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(
            f"{argument}: expected a list of {_name(kind)}, got {type(values).__name__}"
        )
    listed = list(values)
    for i, value in enumerate(listed):
        check_kind(value, kind, f"{argument}[{i}]")
    return listed


def _name(kind: type[Any]) -> str:
    home = "l3ext" if kind.__name__ in l3ext.__all__ else kind.__module__
    return f"{home}.{kind.__qualname__}"
