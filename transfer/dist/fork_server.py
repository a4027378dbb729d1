"""Forks helper processes: `python -P -m transfer.dist.fork_server PID`, one for each transport and door.

It has loaded torch, so a helper of its making is there at once, not after seconds, and shares with the others what was
loaded. Standard input is the channel to the replica (process PID). It holds no key and no pool and is in no group: the
replica gives those to the helpers, through channels of their own. It has one thread, as what forks should. The kernel
ends it with its replica, and its helpers with it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import sys
from collections.abc import Callable

from transfer.dist.orders import Channel, ChannelError, Failed, HelperForked, HelperWanted
from transfer.dist.prctl import end_with_parent, show_as

Run = Callable[[Channel], None]
"""What a helper does, all its life."""


class ForkServer:
    """At the other end of `channel` is a replica."""

    def __init__(self, channel: Channel, run: Run) -> None:
        self._channel = channel
        self._run = run
        self._children: dict[int, int] = {}  # pidfd -> pid
        self._poll = select.poll()
        self._poll.register(channel.sock, select.POLLIN)

    def serve(self) -> None:
        """Return when the replica is gone."""
        while True:
            for fd, _ in self._poll.poll():
                if fd in self._children:
                    self._reap(fd)
                    continue
                try:
                    number, theirs = next_wanted(self._channel)
                    with theirs.sock:
                        self._fork(number, theirs)
                except ChannelError:
                    return

    def _fork(self, number: int, theirs: Channel) -> None:
        server = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            with contextlib.suppress(ChannelError):  # it may not be wanted any more
                theirs.send(Failed(error=f"cannot fork a helper process: {error}"))
            return
        if pid == 0:
            self._become(theirs, server)
        pidfd = os.pidfd_open(pid)  # it is there, ended or not, until it is reaped
        self._children[pidfd] = pid
        self._poll.register(pidfd, select.POLLIN)
        self._channel.send(HelperForked(number=number), [pidfd])

    def _become(self, theirs: Channel, server: int) -> None:
        """A helper. Never returns."""
        try:
            end_with_parent(server)
            self._channel.sock.close()
            for pidfd in self._children:
                os.close(pidfd)
            self._run(theirs)
        finally:
            os._exit(1)  # not by way of the server's loop or the libraries' destructors

    def _reap(self, pidfd: int) -> None:
        self._poll.unregister(pidfd)
        os.waitpid(self._children.pop(pidfd), 0)
        os.close(pidfd)


def next_wanted(channel: Channel) -> tuple[int, Channel]:
    """The number of the next helper that the replica wants, and the helper's end of its channel."""
    message, fds = channel.receive()
    if not isinstance(message, HelperWanted) or len(fds) != 1:
        raise ChannelError(f"a fork server cannot do {message}")
    return message.number, Channel(socket.socket(fileno=fds[0]))


def main() -> None:
    end_with_parent(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the replica's to answer
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or, where a replica ignores it, the kernel reaps helpers
    show_as("kv-fork")
    channel = Channel(socket.socket(fileno=os.dup(0)))
    with open(os.devnull, "rb") as nothing:  # or a helper's connection became its standard input, which others inherit
        os.dup2(nothing.fileno(), 0)
    try:
        from transfer.dist.runner import run
    except Exception as error:  # the replica hears of it when it wants a helper, and goes on without
        with contextlib.suppress(ChannelError):  # it may not want one any more
            _, theirs = next_wanted(channel)
            theirs.send(Failed(error=f"{type(error).__name__}: {error}"[:1000]))
        return
    gc.collect()
    gc.freeze()  # all of torch: no helper needs to look at it, or to have it copied for that
    ForkServer(channel, run).serve()


if __name__ == "__main__":
    main()
