"""A helper process that is in one process group: `python -P -m transfer.dist.runner PID`, started by `helpers.py`.

Lifecycle: standard input is the channel to the replica (process PID). The order comes first; the group is joined; then
a taker or a giver works until the replica or the other side is gone. The process ends at any error, and leaves what to
do about it to the replica. It never outlives the replica: the kernel kills it then. And it never hangs: before each
call into the group an alarm is set, which the kernel answers by ending the process, whatever the library does.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import socket
import sys
from collections.abc import Iterator

from transfer.dist.orders import Channel, ChannelError, Failed, RunnerOrder
from transfer.memory import PeerMemory

_PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """End this process unless the block ends in time."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def work(order: RunnerOrder, channel: Channel, fds: list[int]) -> None:
    """Join, then take or give until the replica or the other side is gone."""
    with limited(order.join_s):
        from transfer.dist.groups import join
        from transfer.dist.side import Side
        from transfer.dist.store import PairStore

        connection = socket.socket(fileno=fds[0])
        connection.settimeout(order.join_s)
        host = connection.getsockname()[0]
        store = PairStore(connection, order.key, rank=order.role == "take")
        group = join(order, store, host=host)
    connection.settimeout(order.piece_s)
    gc.freeze()  # all of torch, that is
    pool = PeerMemory(fds[1], nbytes=order.pool_bytes, writable=order.role == "take")
    side = Side(order=order, channel=channel, connection=connection, group=group, pool=pool, limited=limited)
    if order.role == "take":
        from transfer.dist.taker import Taker

        Taker(side).run()
    else:
        from transfer.dist.giver import Giver

        Giver(side).run()


def main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(sys.argv[1]):
        os._exit(0)  # it died before the kernel knew whom to watch
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the replica's to answer
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    channel = Channel(socket.socket(fileno=0))
    status = 0
    try:
        order, fds = channel.receive()
        if not isinstance(order, RunnerOrder):
            raise ChannelError(f"the first message is {order}")
        work(order, channel, fds)
    except Exception as error:  # whatever it is, the replica hears of it and goes on
        status = 1
        with contextlib.suppress(ChannelError):
            channel.send(Failed(error=f"{type(error).__name__}: {error}"[:1000]))
    os._exit(status)  # not by way of the library's destructors, which may wait for the other side


if __name__ == "__main__":
    main()
