"""Where mooncake-transfer-engine cannot work, whoever asked for it is told what is missing and what to do."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from transfer_pools import Receiver, open_fds

from transfer.memory import SharedMemory
from transfer.mooncake.door import MooncakeDoor
from transfer.mooncake.library import MooncakeUnavailable, check_devices, import_failure


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        ("libibverbs.so.1: cannot open shared object file", "apt-get install libibverbs1"),
        ("libmlx5.so.1: cannot open shared object file", "apt-get install libibverbs1"),
        ("libcudart.so.12: cannot open shared object file", "mooncake-transfer-engine-non-cuda"),
        ("No module named 'mooncake'", r"pip install 'pd-serve\[mooncake\]'"),
        ("libother.so.1: cannot open shared object file", "libother.so.1.*install the system package"),
    ],
)
def test_a_library_that_cannot_be_imported_names_its_remedy(
    error: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Really: a package of that name, found first, fails to be imported in this way."""
    package = tmp_path / "mooncake"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "engine.py").write_text(f"raise ImportError({error!r})\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with SharedMemory(4096) as memory, pytest.raises(MooncakeUnavailable, match=remedy) as raised:
        MooncakeDoor(memory=memory, host="127.0.0.1")
    assert str(raised.value) == import_failure(error)


def test_rdma_devices_are_checked_by_name(tmp_path: Path) -> None:
    for name in ("mlx5_0", "mlx5_1"):
        (tmp_path / name).mkdir()
    check_devices("mlx5_1,mlx5_0", tmp_path)
    with pytest.raises(MooncakeUnavailable, match=r"'mlx5_2' is not one of .*\(mlx5_0, mlx5_1\)"):
        check_devices("mlx5_0,mlx5_2", tmp_path)
    with pytest.raises(MooncakeUnavailable, match=r"\(none\); name one of them, or leave ib_device empty for TCP"):
        check_devices("mlx5_0", tmp_path / "nothing")


def test_a_fetcher_whose_library_does_not_start_leaves_nothing_behind() -> None:
    threads, fds = set(threading.enumerate()), open_fds()
    with pytest.raises(MooncakeUnavailable, match="'no such device' is not one of this machine's RDMA devices"):
        Receiver(transport="mooncake", ib_device="no such device")
    assert set(threading.enumerate()) == threads
    assert {what for fd, what in open_fds().items() if fd not in fds} <= {"/memfd:pd-serve-kv (deleted)"}  # the pool's


def test_an_ipv6_host_is_refused() -> None:
    with SharedMemory(4096) as memory, pytest.raises(ValueError, match="'::1' is an IPv6 address"):
        MooncakeDoor(memory=memory, host="::1")
