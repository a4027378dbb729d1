"""The receiving runner: asks the giver for pieces as the replica orders them, puts them into the pages that they are
for, and says when they are there. It writes nowhere but into the pages of pieces that it has not reported yet."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from transfer.dist.groups import Pending
from transfer.dist.orders import ChannelError, Landed, TakePiece
from transfer.dist.parts import Part, Parts
from transfer.dist.side import Side
from transfer.dist.store import receive_exactly
from transfer.wire import Status, WireError
from transfer.wire_requests import REPLY_BYTES, Reply, decode_reply, encode_request, unpack_runs

_MESSAGES = 2
"""Under way at a time, while one that has come is unpacked."""


@dataclass(frozen=True, kw_only=True)
class _Message:
    """Pages that come together."""

    job: int
    part: Part
    reply: Reply | None
    """That the giver sends before them; with the first of a piece."""
    is_last: bool
    """Of its piece."""


class Taker:
    """Runs in its process's main thread."""

    def __init__(self, side: Side) -> None:
        self._side = side
        self._parts = Parts(
            np.frombuffer(side.pool.view, dtype=np.uint8), side.order.page_bytes, num_buffers=_MESSAGES + 1
        )
        self._asked: deque[_Message] = deque()
        self._pending: deque[tuple[_Message, Pending]] = deque()

    def run(self) -> None:
        """Return when the replica is gone. Raises for all else."""
        side, poll = self._side, self._side.begin()
        while True:
            ready = [fd for fd, _ in poll.poll(0 if self._pending else None)]
            if side.channel.sock.fileno() in ready:
                try:
                    message, _ = side.channel.receive()
                except ChannelError:
                    return
                if not isinstance(message, TakePiece):
                    raise ChannelError(f"a taker cannot do {message}")
                with side.limited(side.order.piece_s):
                    self._ask(message)
            elif self._pending:
                with side.limited(side.order.piece_s):
                    self._land(*self._pending.popleft())
            else:
                raise WireError("the giver is gone")

    def _ask(self, piece: TakePiece) -> None:
        side, order = self._side, self._side.order
        sources, targets = unpack_runs(piece.sources), unpack_runs(piece.targets)
        side.connection.sendall(
            encode_request(order.key, boot=order.boot, job=piece.job, runs=sources, page_bytes=order.page_bytes)
        )
        num_pages = int(targets[:, 1].sum())
        expected = Reply(
            status=Status.OK,
            boot=order.boot,
            job=piece.job,
            num_pages=num_pages,
            byte_length=num_pages * order.page_bytes,
        )
        parts = self._parts.incoming(targets, read_soon=piece.read_soon)
        for index, part in enumerate(parts):
            reply = expected if index == 0 else None
            is_last = index + 1 == len(parts)
            self._asked.append(_Message(job=piece.job, part=part, reply=reply, is_last=is_last))
        self._receive()

    def _receive(self) -> None:
        while self._asked and len(self._pending) < _MESSAGES:
            message = self._asked.popleft()
            self._pending.append((message, self._side.group.receive(message.part.memory, job=message.job)))

    def _land(self, message: _Message, coming: Pending) -> None:
        if message.reply is not None:
            reply = decode_reply(self._side.order.key, receive_exactly(self._side.connection, REPLY_BYTES))
            if reply != message.reply:
                raise WireError(f"the giver answers {reply} where {message.reply} was expected")
        coming.wait()
        self._receive()
        message.part.copy()
        if message.is_last:
            self._side.channel.send(Landed(job=message.job))
