"""A machine that has no process to give: nothing is left open by each attempt, of which there may be many."""

from __future__ import annotations

import errno
import subprocess
import threading
import time

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
