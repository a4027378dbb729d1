"""One side of a group that is there: what a giver has of it, and a taker likewise."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from transfer.dist.groups import PairGroup
from transfer.dist.orders import Channel, Joined, RunnerOrder
from transfer.memory import PeerMemory


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """Everything is its process's, and goes with it."""

    order: RunnerOrder
    channel: Channel
    """To the replica."""
    connection: socket.socket
    """To the other side."""
    group: PairGroup
    pool: PeerMemory
    limited: Callable[[float], AbstractContextManager[None]]
    """`limited(seconds)` ends the process when its block takes longer."""

    def begin(self) -> select.poll:
        """Tell the replica that the group is there. From now on channel and connection are to be listened to."""
        self.channel.send(Joined())
        poll = select.poll()
        for sock in (self.channel.sock, self.connection):
            poll.register(sock, select.POLLIN)
        return poll
