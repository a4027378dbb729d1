"""Which kernels a device gets, decided once when a model is loaded. The one place that knows devices by name."""

from __future__ import annotations

import logging

import torch

from engine.kernels.interface import Kernels
from engine.kernels.jit import JitKernels
from engine.kernels.native import NativeKernels
from native.compiler import NativeUnavailable

logger = logging.getLogger(__name__)


def open_kernels(device: str, *, num_threads: int) -> Kernels:
    """The fastest kernels for `device`. Raises ValueError for a device there are none for.

    A GPU needs flashinfer: its absence is an ImportError that names the extra to install.
    """
    target = torch.device(device)
    if target.type == "cpu":
        return open_cpu_kernels(num_threads=num_threads)
    if target.type != "cuda":
        raise ValueError(f"device {device!r} has no kernels here; there are some for 'cpu' and 'cuda'")
    try:
        from engine.kernels.flashinfer import FlashInferKernels

        return FlashInferKernels(target)
    except ImportError as error:
        raise ImportError(f"device {device!r} needs flashinfer: install pd-serve[gpu] ({error})") from error


def open_cpu_kernels(*, num_threads: int) -> Kernels:
    """The C++ kernels where a compiler is at hand or they are compiled already, else the numba ones."""
    try:
        return NativeKernels(num_threads=num_threads)
    except NativeUnavailable as error:
        logger.warning("no C++ kernels here, falling back to numba (slower): %s", error)
        return JitKernels(num_threads=num_threads)
