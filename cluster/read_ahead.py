"""`python -m cluster.read_ahead`: has the system read what replicas are about to, while Ray starts.

Until Ray is up a machine of few cores waits more than it computes; then every replica imports torch and reads the
weights at once. Where that was not done lately it is mostly waiting for the disk, file after small file. Here one
process of low priority does it ahead for all of them, and leaves nothing behind but the system's page cache.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
from pathlib import Path

_NICENESS = 19  # it must not delay what it is meant to help
_MOST_WEIGHTS = 2 << 30
"""Bytes. Reading more takes longer than Ray does to start, and may not fit the memory."""


def main() -> None:
    """Ends early, and says nothing, whatever is missing: the replicas will say it."""
    parser = argparse.ArgumentParser(prog="python -m cluster.read_ahead", description=__doc__)
    parser.add_argument("model", type=Path, help="a folder of safetensors")
    options = parser.parse_args()
    os.nice(_NICENESS)
    with contextlib.suppress(OSError, AttributeError):  # not every system has posix_fadvise
        read_weights(options.model)
    with contextlib.suppress(ImportError):
        importlib.import_module("cluster.worker")
    os._exit(0)  # nothing was begun that would have to end in order


def read_weights(folder: Path) -> None:
    """Ask the system to read the weights in `folder`, all or none; it does so in the background."""
    files = list(folder.glob("*.safetensors"))
    if sum(file.stat().st_size for file in files) > _MOST_WEIGHTS:
        return
    for file in files:
        with file.open("rb") as weights:
            os.posix_fadvise(weights.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


if __name__ == "__main__":
    main()
