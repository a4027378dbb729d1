"""The sending runner: sends the pages that the taker asks for out of the pool, which it can only read."""

from __future__ import annotations

import socket
from collections import deque

import numpy as np

from transfer.dist.groups import Pending
from transfer.dist.parts import Parts
from transfer.dist.side import Side
from transfer.dist.store import receive_exactly
from transfer.spans import Runs
from transfer.wire import Status, WireError
from transfer.wire_requests import REQUEST_BYTES, Reply, decode_request_head, decode_runs, encode_reply, runs_are_inside

_MESSAGES = 3
"""Under way at a time."""


class Giver:
    """Runs in its process's main thread."""

    def __init__(self, side: Side) -> None:
        self._side = side
        self._parts = Parts(np.frombuffer(side.pool.view, dtype=np.uint8), side.order.page_bytes, num_buffers=_MESSAGES)
        self._last_job = 0
        self._pending: deque[Pending] = deque()

    def run(self) -> None:
        """Return when the replica or the taker is gone. Raises for all else."""
        side, poll = self._side, self._side.begin()
        while True:
            ready = [fd for fd, _ in poll.poll(0 if self._pending else None)]
            if side.channel.sock.fileno() in ready:
                return  # a giver is told nothing more: that is the end of the replica
            if ready and not side.connection.recv(1, socket.MSG_PEEK):
                return
            with side.limited(side.order.piece_s):
                if ready:
                    self._answer()
                else:
                    self._pending.popleft().wait()

    def _answer(self) -> None:
        side, order = self._side, self._side.order
        head = decode_request_head(receive_exactly(side.connection, REQUEST_BYTES))
        if head.boot != order.boot or head.job <= self._last_job:
            raise WireError(f"request {head.job} to boot {head.boot}: not the next one of this connection")
        if not 0 < head.num_runs <= order.piece_pages:
            raise WireError(f"a request of {head.num_runs} runs, where a piece has {order.piece_pages} pages at most")
        self._last_job = head.job
        runs = decode_runs(order.key, head, receive_exactly(side.connection, head.runs_bytes))
        good = runs_are_inside(runs, head, num_pages=order.num_pages, page_bytes=order.page_bytes)
        status = Status.OK if good and head.num_pages <= order.piece_pages else Status.BAD_PAGES
        sent = head.num_pages if status is Status.OK else 0
        reply = Reply(status=status, boot=order.boot, job=head.job, num_pages=sent, byte_length=sent * order.page_bytes)
        side.connection.sendall(encode_reply(order.key, reply))
        if sent:
            self._send(runs, job=head.job)

    def _send(self, runs: Runs, *, job: int) -> None:
        for part in self._parts.outgoing(runs):
            if len(self._pending) == _MESSAGES:
                self._pending.popleft().wait()
            part.copy()
            self._pending.append(self._side.group.send(part.memory, job=job))
