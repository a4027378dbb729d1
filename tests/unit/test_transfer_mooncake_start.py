"""Processes that cannot be started, of which nothing is left open by each attempt, and one that has died."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from transfer_pools import WAIT_S, open_fds

from transfer.io_loop import IoLoop
from transfer.memory import SharedMemory
from transfer.mooncake.bounce import Bounce
from transfer.mooncake.door import MooncakeDoor


@pytest.fixture
def no_processes(monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.EAGAIN, "no process is left")

    monkeypatch.setattr(subprocess, "Popen", refuse)


def test_a_bounce_that_cannot_start_leaves_nothing_open(no_processes):
    loop = IoLoop(name="bounce", clock=time.monotonic)
    before = open_fds()
    with pytest.raises(OSError, match="no process is left"):
        Bounce(
            loop,
            ib_device="",
            num_slots=4,
            block_bytes=1 << 16,
            changed=threading.Condition(threading.RLock()),
            on_message=lambda bounce: None,
        )
    assert open_fds() == before
    loop.close(timeout_s=WAIT_S)


def test_a_door_that_cannot_open_leaves_nothing_open(no_processes):
    with SharedMemory(1 << 16) as memory:
        before = open_fds()
        with pytest.raises(OSError, match="no process is left"):
            MooncakeDoor(memory=memory, host="127.0.0.1")
        assert open_fds() == before


def test_nobody_is_held_up_by_the_end_of_a_process(monkeypatch, caplog):
    """Its state is waited for without the lock that callers take."""
    changed = threading.Condition(threading.RLock())
    wait, was_free = subprocess.Popen.wait, []

    def take_lock() -> bool:
        if taken := changed.acquire(blocking=False):
            changed.release()
        return taken

    def watched_wait(process, timeout=None):
        was_free.append(other.submit(take_lock).result())
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", watched_wait)
    loop = IoLoop(name="bounce", clock=time.monotonic)
    with ThreadPoolExecutor(max_workers=1) as other:
        bounce = Bounce(
            loop, ib_device="", num_slots=4, block_bytes=1 << 16, changed=changed, on_message=lambda bounce: None
        )
        bounce.watch()
        os.kill(bounce.pid, signal.SIGKILL)
        with changed:
            assert changed.wait_for(lambda: bounce.dead, WAIT_S)
            assert bounce.take_unused()
        bounce.close(timeout_s=WAIT_S)
        loop.close(timeout_s=WAIT_S)
    assert was_free
    assert all(was_free)
    assert f"the mooncake process {bounce.pid} ended (signal 9)" in caplog.text
