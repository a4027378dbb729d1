"""What a helper process does, which is in one process group. `fork_server.py` forks it.

Lifecycle: the order comes first, over the channel to the replica; the group is joined; then a taker or a giver works
until the replica or the other side is gone. The process ends at any error, and leaves what to do about it to the
replica. It never outlives the replica: the kernel kills it then. And it never hangs: before each call into the group an
alarm is set, which the kernel answers by ending the process, whatever the library does; and a thread of its own ends it
when the other side goes, which the library would not always notice in the middle of a message.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator

from transfer.dist.giver import Giver
from transfer.dist.groups import join
from transfer.dist.orders import Channel, ChannelError, Failed, RunnerOrder
from transfer.dist.prctl import show_as
from transfer.dist.side import Side
from transfer.dist.store import PairStore
from transfer.dist.taker import Taker
from transfer.memory import PeerMemory

_GRACE_S = 0.2
"""In which the working thread can say better what happened."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """End this process unless the block ends in time."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def end_with_other_side(connection: socket.socket, channel: Channel) -> None:
    """Runs in a thread of its own, and leaves nothing in this process undone that anybody waits for."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    poll.poll()
    time.sleep(_GRACE_S)
    with contextlib.suppress(ChannelError):
        channel.send(Failed(error="the other side of the group is gone"))
    os._exit(1)


def work(order: RunnerOrder, channel: Channel, fds: list[int]) -> None:
    """Join, then take or give until the replica or the other side is gone."""
    show_as(f"kv-{order.role}")
    connection = socket.socket(fileno=fds[0])
    connection.settimeout(order.join_s)
    threading.Thread(target=end_with_other_side, args=(connection, channel), daemon=True).start()
    with limited(order.join_s):
        store = PairStore(connection, order.key, rank=order.role == "take")
        group = join(order, store, host=connection.getsockname()[0])
    connection.settimeout(order.piece_s)
    pool = PeerMemory(fds[1], nbytes=order.pool_bytes, writable=order.role == "take")
    side = Side(order=order, channel=channel, connection=connection, group=group, pool=pool, limited=limited)
    (Taker if order.role == "take" else Giver)(side).run()


def run(channel: Channel) -> None:
    """Be a helper, and end the process."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
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
