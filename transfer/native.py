"""This folder's little C, compiled on first use."""

from __future__ import annotations

import ctypes
from pathlib import Path

from native.compiler import C
from native.library import Recipe, load_library

_FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off")
"""Nothing of one processor's own, which gains nothing here. Arithmetic rounds after each operation, so that every
processor has the same results."""


def load_c(name: str) -> ctypes.CDLL:
    """The library of <name>.c. Raises `NativeUnavailable`."""
    return load_library(Recipe(source=Path(__file__).parent / f"{name}.c", language=C, flags=_FLAGS))
