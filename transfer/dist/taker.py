"""The receiving runner: asks the giver for pieces as the replica orders them, and says when they have landed."""

from __future__ import annotations

import select
import socket
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from transfer.dist.groups import PairGroup, Pending
from transfer.dist.orders import Channel, ChannelError, Joined, Landed, RunnerOrder, TakePiece
from transfer.dist.store import receive_exactly
from transfer.memory import SharedMemory
from transfer.wire import Status, WireError
from transfer.wire_requests import REPLY_BYTES, Reply, decode_reply, encode_request, unpack_runs


class Taker:
    """Runs in its process's only thread. `limited(seconds)` ends the process when its block takes longer."""

    def __init__(
        self,
        order: RunnerOrder,
        channel: Channel,
        connection: socket.socket,
        group: PairGroup,
        limited: Callable[[float], AbstractContextManager[None]],
    ) -> None:
        self._order = order
        self._channel = channel
        self._connection = connection
        self._group = group
        self._limited = limited
        self._memory = SharedMemory(order.num_slots * order.slot_bytes)
        self._slots = torch.frombuffer(self._memory.view, dtype=torch.uint8).view(order.num_slots, -1)
        self._pending: deque[tuple[Reply, Pending]] = deque()  # the reply that is expected, and the piece

    def run(self) -> None:
        """Return when the replica is gone. Raises for all else."""
        self._channel.send(Joined(), [self._memory.fd])
        poll = select.poll()
        for sock in (self._channel.sock, self._connection):
            poll.register(sock, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poll.poll(0 if self._pending else None)]
            if self._channel.sock.fileno() in ready:
                try:
                    message, _ = self._channel.receive()
                except ChannelError:
                    return
                if not isinstance(message, TakePiece):
                    raise ChannelError(f"a taker cannot do {message}")
                self._ask(message)
            elif self._pending:
                self._land(*self._pending.popleft())
            else:
                raise WireError("the giver is gone")

    def _ask(self, piece: TakePiece) -> None:
        order = self._order
        runs = unpack_runs(piece.runs)
        request = encode_request(order.key, boot=order.boot, job=piece.job, runs=runs, page_bytes=order.page_bytes)
        lengths = (runs[:, 1] * order.page_bytes).tolist()
        expected = Reply(
            status=Status.OK,
            boot=order.boot,
            job=piece.job,
            num_pages=int(runs[:, 1].sum()),
            byte_length=sum(lengths),
        )
        with self._limited(order.piece_s):
            self._connection.sendall(request)
            slot = self._slots[piece.slot][: expected.byte_length]
            self._pending.append((expected, self._group.receive(slot, lengths, job=piece.job)))

    def _land(self, expected: Reply, piece: Pending) -> None:
        with self._limited(self._order.piece_s):
            reply = decode_reply(self._order.key, receive_exactly(self._connection, REPLY_BYTES))
            if reply != expected:
                raise WireError(f"the giver answers {reply} where {expected} was expected")
            piece.wait()
        self._channel.send(Landed(job=expected.job))
