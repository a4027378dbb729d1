"""The sending runner: sends the pages that the taker asks for out of the pool, which it can only read."""

from __future__ import annotations

import select
import socket
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np

from transfer.dist.groups import PairGroup, Pending
from transfer.dist.orders import Channel, Joined, RunnerOrder
from transfer.dist.parts import Parts
from transfer.dist.store import receive_exactly
from transfer.memory import PeerMemory
from transfer.spans import Runs
from transfer.wire import Status, WireError
from transfer.wire_requests import REQUEST_BYTES, Reply, decode_request_head, decode_runs, encode_reply, runs_are_inside

_MESSAGES = 3
"""Under way at a time."""


class Giver:
    """Runs in its process's only thread. `limited(seconds)` ends the process when its block takes longer."""

    def __init__(
        self,
        order: RunnerOrder,
        channel: Channel,
        connection: socket.socket,
        group: PairGroup,
        pool: PeerMemory,
        limited: Callable[[float], AbstractContextManager[None]],
    ) -> None:
        self._order = order
        self._channel = channel
        self._connection = connection
        self._group = group
        self._limited = limited
        self._parts = Parts(np.frombuffer(pool.view, dtype=np.uint8), order.page_bytes, num_buffers=_MESSAGES)
        self._last_job = 0
        self._pending: deque[Pending] = deque()

    def run(self) -> None:
        """Return when the replica or the taker is gone. Raises for all else."""
        self._channel.send(Joined())
        poll = select.poll()
        for sock in (self._channel.sock, self._connection):
            poll.register(sock, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poll.poll(0 if self._pending else None)]
            if self._channel.sock.fileno() in ready:
                return  # a giver is told nothing more: that is the end of the replica
            if ready and not self._connection.recv(1, socket.MSG_PEEK):
                return
            with self._limited(self._order.piece_s):
                if ready:
                    self._answer()
                else:
                    self._pending.popleft().wait()

    def _answer(self) -> None:
        order = self._order
        head = decode_request_head(receive_exactly(self._connection, REQUEST_BYTES))
        if head.boot != order.boot or head.job <= self._last_job:
            raise WireError(f"request {head.job} to boot {head.boot}: not the next one of this connection")
        if not 0 < head.num_runs <= order.piece_pages:
            raise WireError(f"a request of {head.num_runs} runs, where a piece has {order.piece_pages} pages at most")
        self._last_job = head.job
        runs = decode_runs(order.key, head, receive_exactly(self._connection, head.runs_bytes))
        good = runs_are_inside(runs, head, num_pages=order.num_pages, page_bytes=order.page_bytes)
        status = Status.OK if good and head.num_pages <= order.piece_pages else Status.BAD_PAGES
        sent = head.num_pages if status is Status.OK else 0
        reply = Reply(status=status, boot=order.boot, job=head.job, num_pages=sent, byte_length=sent * order.page_bytes)
        self._connection.sendall(encode_reply(order.key, reply))
        if sent:
            self._send(runs, job=head.job)

    def _send(self, runs: Runs, *, job: int) -> None:
        for part in self._parts.outgoing(runs):
            if len(self._pending) == _MESSAGES:
                self._pending.popleft().wait()
            part.copy()
            self._pending.append(self._group.send(part.memory, job=job))
