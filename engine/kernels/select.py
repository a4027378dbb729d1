"""Which kernels a device gets, decided once when a model is loaded."""

from __future__ import annotations

import logging

from engine.kernels.build import KernelBuildError
from engine.kernels.interface import Kernels
from engine.kernels.jit import JitKernels
from engine.kernels.native import NativeKernels

logger = logging.getLogger(__name__)


def open_cpu_kernels(*, num_threads: int) -> Kernels:
    """The C++ kernels where a compiler is at hand or they are compiled already, else the numba ones."""
    try:
        return NativeKernels(num_threads=num_threads)
    except KernelBuildError as error:
        logger.warning("no C++ kernels here, falling back to numba (slower): %s", error)
        return JitKernels(num_threads=num_threads)
