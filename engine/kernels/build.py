"""The C++ kernels, compiled on first use for this processor.

They are linked with the OpenMP runtime that torch has already loaded, so that torch's operations and these kernels
share one team of threads; two teams would double the threads and make each wait for the other's cores.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from native.compiler import CPP, NativeUnavailable
from native.library import Recipe, build_library

SOURCES = Path(__file__).parent / "csrc"
_FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fno-math-errno", "-w")
_OPENMP_LIBRARY = re.compile(r"/lib(gomp|iomp5|omp)\b[^/]*$")


def build_kernels(unit: str = "kernels", *, environment: Mapping[str, str] = os.environ) -> Path:
    """The library of csrc/<unit>.cpp, compiled now if this machine has not done so yet. Raises `NativeUnavailable`."""
    recipe = Recipe(
        source=SOURCES / f"{unit}.cpp",
        language=CPP,
        flags=_FLAGS,
        links=(str(loaded_openmp_runtime()),),
        for_this_processor=True,
    )
    return build_library(recipe, environment=environment)


def loaded_openmp_runtime() -> Path:
    """The OpenMP library that torch brought into this process. Raises `NativeUnavailable` when there is none."""
    site = Path(torch.__file__).parents[1]
    with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8") as maps:
        loaded = {Path(path) for path in _paths(maps) if _OPENMP_LIBRARY.search(path)}
        if loaded:
            # Other packages may have brought runtimes of their own; torch's lies in its wheel or is the system's.
            return min(loaded, key=lambda path: (site / "torch" not in path.parents, site in path.parents, path))
    bundled = sorted(site.glob("torch/lib/libgomp*"))
    if bundled:
        return bundled[0]
    raise NativeUnavailable("torch has loaded no OpenMP runtime in this process, so kernels cannot share its threads")


def _paths(maps: Iterable[str]) -> Iterable[str]:
    for line in maps:
        fields = line.split(maxsplit=5)
        if len(fields) == 6:
            yield fields[5].rstrip("\n")
