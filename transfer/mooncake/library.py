"""The one place that imports mooncake-transfer-engine, and what to do where that fails.

Only the child processes of this package call `new_engine`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_REMEDIES = (
    (("libibverbs", "libmlx5", "librdmacm", "libnl-"), "install Debian's libibverbs1 (apt-get install libibverbs1)"),
    (
        ("libcuda", "libcudart"),
        "this wheel is the one for CUDA; replace it with mooncake-transfer-engine-non-cuda, which the extra `mooncake` "
        "installs (pip uninstall mooncake-transfer-engine; pip install 'pd-serve[mooncake]')",
    ),
    (("libnuma",), "install Debian's libnuma1 (apt-get install libnuma1)"),
    (("libcurl",), "install Debian's libcurl4 (apt-get install libcurl4)"),
    (("No module named",), "install the extra `mooncake` (pip install 'pd-serve[mooncake]')"),
)


class MooncakeUnavailable(RuntimeError):
    """The library cannot be used on this machine as configured; the message has the remedy."""


def new_engine(*, host: str, ib_device: str) -> Any:
    """A started TransferEngine that shakes hands with its peers directly. Raises `MooncakeUnavailable`."""
    if ib_device:
        check_devices(ib_device)
    try:
        from mooncake.engine import TransferEngine
    except ImportError as error:
        raise MooncakeUnavailable(import_failure(str(error))) from error
    engine = TransferEngine()
    protocol = "rdma" if ib_device else "tcp"
    if engine.initialize(host, "P2PHANDSHAKE", protocol, ib_device) != 0:
        raise MooncakeUnavailable(f"mooncake-transfer-engine does not start for {protocol} at host {host!r}")
    return engine


def import_failure(error: str) -> str:
    """What to tell a user whose import of the library failed with `error`."""
    for names, remedy in _REMEDIES:
        if any(name in error for name in names):
            return f"mooncake-transfer-engine cannot be imported ({error}): {remedy}"
    return f"mooncake-transfer-engine cannot be imported ({error}): install the system package that provides it"


def check_devices(ib_device: str, folder: Path = Path("/sys/class/infiniband")) -> None:
    """The library would fall back to TCP without a word. Raises `MooncakeUnavailable` for a device not in `folder`."""
    present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    for device in ib_device.split(","):
        if device not in present:
            raise MooncakeUnavailable(
                f"ib_device {device!r} is not one of this machine's RDMA devices ({', '.join(present) or 'none'}); "
                "name one of them, or leave ib_device empty for TCP"
            )
