"""Helper processes from the replica's side: real ones, of a server that forks them."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import msgspec
import pytest
from transfer_pools import WAIT_S, FakeClock, closing, freeze, open_fds, until

from transfer.dist.fork_server import ForkServer
from transfer.dist.helpers import Helper, Helpers
from transfer.dist.orders import Channel, ChannelError, Failed, HelperWanted, Message, RunnerOrder, make_order
from transfer.io_loop import IoLoop
from transfer.memory import SharedMemory
from transfer.transport import TransferTimings

PAGE = 4096
START_S = 120.0
"""For torch to be loaded, on the busiest machine."""
ORDER = make_order("give", "gloo", key=bytes(32), boot=1, num_pages=1, page_bytes=PAGE, timings=TransferTimings())


class Replica:
    """The part of a replica that has helpers; what happens to them is for its loop to say."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.loop = IoLoop(name="replica", clock=self.clock)
        self.helpers = Helpers(self.loop, clock=self.clock, timings=TransferTimings())
        self.memory = SharedMemory(PAGE)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.connection = socket.create_connection(listener.getsockname())
            accepted, _ = listener.accept()
        self.given = [accepted.detach(), self.memory.reading_fd]

    def start(self, order: RunnerOrder = ORDER) -> Helper:
        return self.in_loop(lambda: self.helpers.start(order, self.given))

    def end(self, helper: Helper) -> threading.Event:
        """Set when it is gone."""
        gone = threading.Event()
        self.in_loop(lambda: self.helpers.end(helper, gone.set))
        return gone

    def server(self) -> int:
        """The process that forks."""
        server = self.in_loop(lambda: self.helpers._server)
        assert server is not None
        return server._process.pid

    def in_loop(self, call: Callable):
        answer = Future()
        self.loop.call_soon(lambda: fulfil(answer, call))
        return answer.result(WAIT_S)

    def close(self) -> None:
        self.helpers.close(timeout_s=WAIT_S)
        self.loop.close(timeout_s=WAIT_S)
        self.connection.close()
        os.close(self.given[0])
        self.memory.close()


def fulfil(answer: Future, call: Callable) -> None:
    try:
        answer.set_result(call())
    except Exception as error:
        answer.set_exception(error)


@pytest.fixture
def replica() -> Iterator[Replica]:
    before = open_fds()
    with closing(Replica()) as (replica,):
        yield replica
    assert open_fds() == before


def message(helper: Helper) -> Message:
    """What it says next."""
    assert select.select([helper.channel.sock], [], [], START_S)[0]
    found, _ = helper.channel.receive()
    return found


def test_a_helper_gets_its_order_and_says_what_went_wrong_with_it(replica):
    helper = replica.start()
    replica.connection.close()  # nobody to meet
    assert isinstance(failed := message(helper), Failed)
    assert "the other side" in failed.error
    with pytest.raises(ChannelError, match="the other end is gone"):
        message(helper)
    assert replica.end(helper).wait(WAIT_S)


def test_a_helper_that_cannot_be_given_its_order_is_not_left_waiting_for_it(replica):
    helper = replica.start(msgspec.structs.replace(ORDER, key=bytes(1 << 20)))  # more than a packet holds
    with pytest.raises(ChannelError, match="the other end is gone"):
        message(helper)
    assert replica.end(helper).wait(WAIT_S)


def test_nothing_that_a_helper_was_given_is_its_standard_input(replica):
    helper, server = replica.start(), replica.server()
    children = Path(f"/proc/{server}/task/{server}/children")
    until(lambda: children.read_text() != "", within_s=START_S)
    process = Path(f"/proc/{int(children.read_text())}")
    until(lambda: (process / "comm").read_text() == "kv-give\n")  # it has been given its connection
    assert os.readlink(process / "fd" / "0") == os.devnull
    replica.end(helper)


def test_a_helper_that_is_ended_before_it_is_there_was_given_nothing(replica):
    server = replica.server()
    freeze(server)
    before = open_fds()
    helper = replica.start()
    assert replica.end(helper).wait(WAIT_S)  # though there is nobody yet to be killed
    assert open_fds() == before
    os.kill(server, signal.SIGCONT)
    another = replica.start()
    replica.connection.close()
    assert isinstance(message(another), Failed)
    replica.end(another)


def test_a_server_outlives_its_helpers_where_the_replica_ignores_the_end_of_processes(replica):
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        os.kill(replica.server(), signal.SIGKILL)
        until_gone(replica)
        replica.connection.close()
        servers = {end_by_itself(replica) for _ in range(3)}
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert len(servers) == 1


def end_by_itself(replica: Replica) -> int:
    """Have a helper that ends soon. Which server forked it."""
    helper = replica.start()
    assert isinstance(message(helper), Failed)
    with pytest.raises(ChannelError, match="the other end is gone"):
        message(helper)
    server = replica.server()
    assert replica.end(helper).wait(WAIT_S)
    return server


def test_a_server_that_forks_no_helper_in_time_is_replaced(replica):
    freeze(replica.server())
    helper = replica.start()
    replica.clock.advance(TransferTimings().join_s + 1)
    with pytest.raises(ChannelError, match="the other end is gone"):
        message(helper)
    assert replica.end(helper).wait(WAIT_S)
    another = replica.start()
    replica.connection.close()
    assert isinstance(message(another), Failed)
    replica.end(another)


def test_a_replica_without_descriptors_has_no_helper_until_there_are_some(replica):
    os.kill(replica.server(), signal.SIGKILL)
    until_gone(replica)
    with no_more_descriptors(), pytest.raises(ChannelError, match="Too many open files"):
        replica.start()
    replica.connection.close()
    end_by_itself(replica)


@contextlib.contextmanager
def no_more_descriptors() -> Iterator[None]:
    """For this process: the lowest one that is free is beyond the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_why_torch_cannot_be_loaded_is_said(replica, monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('a broken torch')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    os.kill(replica.server(), signal.SIGKILL)
    until_gone(replica)
    helper = replica.start()
    assert message(helper) == Failed(error="ImportError: a broken torch")
    replica.end(helper)


def until_gone(replica: Replica) -> None:
    until(lambda: replica.in_loop(lambda: replica.helpers._server) is None)


def test_after_close_there_is_no_helper_to_be_had():
    with closing(Replica()) as (replica,):
        server = os.pidfd_open(replica.server())
        replica.helpers.close(timeout_s=WAIT_S)
        assert select.select([server], [], [], 0)[0]
        os.close(server)
        with pytest.raises(ChannelError, match="closed"):
            replica.start()


@pytest.mark.parametrize("wanted", [0, 1], ids=["idle", "asked"])
@pytest.mark.parametrize("torch", ["real", "broken"])
def test_a_server_whose_replica_is_gone_ends_without_complaint(wanted, torch, tmp_path):
    if torch == "broken":
        (tmp_path / "torch.py").write_text("raise ImportError('a broken torch')")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
        server = subprocess.Popen(
            [sys.executable, "-P", "-m", "transfer.dist.fork_server", str(os.getpid())],
            stdin=theirs.fileno(),
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
    with ours:
        for number in range(wanted):
            helper, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with helper, its:
                Channel(ours).send(HelperWanted(number=number), [its.fileno()])
    _, said = server.communicate(timeout=START_S)
    assert (server.returncode, said.decode()) == (0, "")


def test_a_fork_that_fails_is_said_to_whoever_wanted_it_and_the_next_is_tried(monkeypatch):
    def no_process() -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", no_process)
    replica, theirs = (Channel(sock) for sock in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    thread = threading.Thread(target=ForkServer(theirs, lambda channel: None).serve)
    thread.start()
    for number in range(2):
        helper, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with helper:
            helper.settimeout(WAIT_S)
            with its:
                replica.send(HelperWanted(number=number), [its.fileno()])
            failed, _ = Channel(helper).receive()
            assert isinstance(failed, Failed)
            assert "cannot fork a helper process" in failed.error
    replica.sock.close()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    theirs.sock.close()
