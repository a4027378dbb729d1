"""This folder's little C, compiled on first use."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from native.compiler import C, NativeUnavailable
from native.library import Recipe, load_library

logger = logging.getLogger(__name__)

I64, INT, PTR = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p

_FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off")
"""Nothing of one processor's own, which gains nothing here. Arithmetic rounds after each operation, so that every
processor has the same results."""


def load_c(name: str, functions: Mapping[str, tuple[Any, tuple[Any, ...]]], *, without: str) -> ctypes.CDLL | None:
    """The library of <name>.c, each of its `functions` declared by (result, arguments).

    None where it cannot be had: the log then says what is done `without` it, and why.
    """
    try:
        library = load_library(Recipe(source=Path(__file__).parent / f"{name}.c", language=C, flags=_FLAGS))
    except NativeUnavailable as error:
        logger.warning("%s: %s", without, error)
        return None
    for function, (result, arguments) in functions.items():
        declared = getattr(library, function)
        declared.restype, declared.argtypes = result, arguments
    return library
