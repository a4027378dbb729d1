"""The loop behind all sockets: calls in order, timers on the clock given, and bugs that stay where they are."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from transfer_pools import WAIT_S, FakeClock, open_fds

from transfer.io_loop import READ, WRITE, IoLoop
from transfer.stall_watch import StallWatch


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def loop(clock):
    loop = IoLoop(name="test", clock=clock)
    yield loop
    loop.close(timeout_s=WAIT_S)


def sync(loop):
    """Wait until the loop has run all that was asked of it so far."""
    done = threading.Event()
    loop.call_soon(done.set)
    assert done.wait(WAIT_S)


def test_calls_run_in_order_in_the_loops_thread(loop):
    seen = []
    for number in range(100):
        loop.call_soon(lambda number=number: seen.append((number, threading.current_thread().name)))
    sync(loop)
    assert seen == [(number, "test") for number in range(100)]


def test_timers_follow_the_clock(loop, clock):
    seen, last = [], threading.Event()
    loop.call_at(clock() + 10, lambda: (seen.append("late"), last.set()))
    loop.call_at(clock() + 5, lambda: seen.append("early"))
    cancelled = loop.call_at(clock() + 7, lambda: seen.append("never"))
    cancelled.cancel()
    sync(loop)
    assert seen == []
    clock.advance(20)
    assert last.wait(WAIT_S)
    assert seen == ["early", "late"]


def test_cancelled_timers_do_not_pile_up(loop, clock):
    for _ in range(10_000):
        loop.call_at(clock() + 1000, lambda: None).cancel()
    assert len(loop._timers) < 1000


def test_many_living_timers_are_not_gone_through_at_each_call(loop, clock, monkeypatch):
    compactions = []
    drop = loop._drop_cancelled
    monkeypatch.setattr(loop, "_drop_cancelled", lambda: (compactions.append(len(loop._timers)), drop()))
    timers = [loop.call_at(clock() + 1000 + number, lambda: None) for number in range(5000)]
    assert len(compactions) <= 5, compactions
    for timer in timers:
        timer.cancel()


def test_a_call_after_the_end_writes_to_nobodys_descriptor(clock):
    loop = IoLoop(name="over", clock=clock)
    number = loop._wakeup
    loop.close(timeout_s=WAIT_S)
    ours = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        os.dup2(ours, number)  # what happens to be opened next may well get the number
        loop.call_soon(lambda: None)
        loop.call_at(clock() - 1, lambda: None)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(ours)
    finally:
        os.close(ours)
        if number != ours:
            os.close(number)


def test_a_failing_callback_takes_nothing_along(loop, caplog):
    loop.call_soon(lambda: 1 // 0)
    sync(loop)
    assert "division" in caplog.text


def call_here(loop, callback):
    """Have `callback` called at once until that is here: the loop may happen to be awake."""
    threads, give_up = [], time.monotonic() + WAIT_S
    while threading.current_thread() not in threads:
        assert time.monotonic() < give_up, "the loop never slept"
        sync(loop)
        loop.call_at_once(lambda: (threads.append(threading.current_thread()), callback()))
    sync(loop)


def test_a_call_at_once_is_made_by_whoever_asks_while_the_loop_sleeps(loop):
    seen = []
    call_here(loop, lambda: seen.append(threading.current_thread()))
    assert seen[-1] is threading.current_thread()


def test_a_call_at_once_waits_its_turn_while_the_loop_is_awake(loop):
    seen, awake, go_on, done = [], threading.Event(), threading.Event(), threading.Event()
    loop.call_soon(lambda: (awake.set(), go_on.wait(WAIT_S), seen.append("before")))
    assert awake.wait(WAIT_S)
    loop.call_at_once(lambda: (seen.append(threading.current_thread().name), done.set()))
    assert seen == []
    go_on.set()
    assert done.wait(WAIT_S)
    assert seen == ["before", "test"]


def test_a_call_at_once_neither_overtakes_nor_nests(loop):
    seen = []

    def ask():
        seen.clear()
        loop.call_soon(lambda: seen.append("first"))
        loop.call_at_once(lambda: seen.append("second"))
        seen.append("asked")

    call_here(loop, ask)
    assert seen == ["asked", "first", "second"]


def test_the_loop_waits_for_a_call_at_once(loop):
    meanwhile = []

    def ask():
        ran = threading.Event()
        loop.call_soon(ran.set)
        meanwhile.append(ran.wait(0.05))

    call_here(loop, ask)
    assert not any(meanwhile)


def test_a_call_at_once_that_fails_leaves_the_loop_alive(loop, caplog):
    loop.call_at_once(lambda: 1 // 0)
    sync(loop)
    assert "division" in caplog.text


def test_after_the_end_nothing_is_called_at_once(clock):
    loop, seen = IoLoop(name="over", clock=clock), []
    loop.close(timeout_s=WAIT_S)
    loop.call_at_once(lambda: seen.append("late"))
    assert seen == []


def test_a_loop_that_dies_is_dead_and_says_of_what(caplog):
    def broken():
        if threading.current_thread().name == "mortal":
            raise RuntimeError("no clock")
        return 0.0

    loop = IoLoop(name="mortal", clock=broken)
    loop._thread.join(10)
    assert not loop.is_alive
    assert "the loop of mortal died" in caplog.text
    assert "no clock" in caplog.text
    loop.close(timeout_s=10)


def test_sockets_are_watched_until_they_are_forgotten(loop):
    one, other = socket.socketpair()
    seen, ready = [], threading.Event()

    def readable():
        seen.append(one.recv(10))
        ready.set()

    with one, other:
        loop.call_soon(lambda: loop.watch(one, WRITE, lambda: loop.watch(one, READ, readable)))
        other.send(b"a")
        assert ready.wait(WAIT_S)
        loop.call_soon(lambda: (loop.forget(one), loop.forget(one)))
        sync(loop)
        other.send(b"b")
        sync(loop)
        assert seen == [b"a"]


def test_close_runs_what_is_ready_and_leaves_nothing(clock):
    fds, threads = open_fds(), set(threading.enumerate())
    loop, seen = IoLoop(name="test", clock=clock), []
    loop.call_soon(lambda: loop.call_soon(lambda: seen.append("last")))
    loop.close(timeout_s=WAIT_S)
    loop.close(timeout_s=WAIT_S)
    assert seen == ["last"]
    assert (open_fds(), set(threading.enumerate())) == (fds, threads)


def test_close_says_when_a_callback_hangs(clock):
    loop, release = IoLoop(name="test", clock=clock), threading.Event()
    loop.call_soon(lambda: release.wait(WAIT_S))
    with pytest.raises(TimeoutError, match="test is still busy"):
        loop.close(timeout_s=0.01)
    release.set()


STOPPED = """
import socket, sys, time
from transfer.io_loop import READ, IoLoop

sock, loop = socket.socket(fileno=int(sys.argv[1])), IoLoop(name="stopped", clock=time.monotonic)
loop.call_soon(lambda: loop.watch(sock, READ, lambda: print(sock.recv(10).decode(), flush=True)))
loop.call_at(time.monotonic() + 1.5, lambda: print("too late", flush=True))
print("ready", flush=True)
sys.stdin.read()
"""


def test_what_came_while_the_process_was_stopped_came_in_time():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-c", STOPPED, str(theirs.fileno())]
        process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with process:
            try:
                assert process.stdout.readline() == "ready\n"
                process.send_signal(signal.SIGSTOP)
                os.waitpid(process.pid, os.WUNTRACED)
                ours.send(b"in time")
                time.sleep(1.6)  # by now its limit has passed
                process.send_signal(signal.SIGCONT)
                assert process.stdout.readline() == "in time\n"
            finally:
                process.kill()


class Watched:
    """A stall watch of twelve seconds, and how often it called."""

    def __init__(self, loop, clock):
        self.loop, self.clock, self.calls = loop, clock, []
        self.watch = StallWatch(loop, clock=clock, seconds=12, on_stall=lambda: self.calls.append(clock()))

    def wait(self, seconds):
        """Let the loop see the clock after this."""
        self.clock.advance(seconds)
        for _ in range(2):  # timers come after what was asked for, and before what is asked for next
            sync(self.loop)


def test_a_watch_calls_once_nothing_has_moved_for_long_enough(loop, clock):
    watched = Watched(loop, clock)
    for _ in range(4):
        watched.wait(3)
    assert watched.calls == []
    for _ in range(5):
        watched.wait(3)
    assert watched.calls == [1015]


def test_a_watch_begins_anew_with_every_move(loop, clock):
    watched = Watched(loop, clock)
    for _ in range(40):
        watched.wait(3)
        watched.watch.moved()
    assert watched.calls == []
    watched.watch.cancel()
    for _ in range(9):
        watched.wait(3)
    assert watched.calls == []


def test_a_watch_takes_our_own_pause_for_nobodys(loop, clock):
    watched = Watched(loop, clock)
    watched.wait(3600)
    assert watched.calls == []
    watched.watch.cancel()
