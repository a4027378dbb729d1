"""One tensor-parallel rank in a process of its own: gives its pool to others, or takes its part of theirs.

Run as a program it obeys orders, one JSON line each, and ends with its parent's end of the pipe. Whoever makes a `Rank`
closes it.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
from kv_world import KVPool, KVWorld
from transfer_pools import WAIT_S, Receiver, closing

from protocol.handshake import PoolShape, RegionTicket
from protocol.rooms import PeerAddress
from transfer.checksum import page_checksums
from transfer.choice import TransportName
from transfer.grains import PoolGrains, page_grains
from transfer.int8_codec import Int8Codec
from transfer.layout import cut_between, grain_tokens
from transfer.memory import SharedMemory
from transfer.server import PageServer

SECRET = b"the cluster secret of the ranks"
Answer = TypeVar("Answer")


class RankOrder(msgspec.Struct, frozen=True):
    """Which rank of which model, holding which sequence."""

    kv_heads: int
    tokens: int
    tp_rank: int
    tp_size: int
    page_size: int
    boot: int
    int8: bool = False
    """Whether KV moves in 8 bits."""


class Give(msgspec.Struct, frozen=True, tag="give"):
    """Serve a pool that holds the sequence, in place of the one before. Answered by `Given`."""

    rank: RankOrder


class Given(msgspec.Struct, frozen=True):
    address: PeerAddress
    ticket: RegionTicket
    pages: list[int]


class Hash(msgspec.Struct, frozen=True, tag="hash"):
    """Answer with the checksums of the sequence, as a pool of this shape takes it."""

    shape: PoolShape
    page_bytes: int


class TakeFrom(msgspec.Struct, frozen=True):
    given: Given
    checksums: list[int]


class Take(msgspec.Struct, frozen=True, tag="take"):
    """Take the sequence from all of these into an empty pool, and look whether it is right. Answered by `Taken`."""

    rank: RankOrder
    transport: TransportName
    sources: list[TakeFrom]


class Taken(msgspec.Struct, frozen=True):
    errors: list[str]
    bytes: int
    transports: list[str]


_ORDERS = msgspec.json.Decoder(Give | Hash | Take)


class Rank:
    """The process, as its parent sees it."""

    def __init__(self) -> None:
        root = Path(__file__).parents[2]
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(root)},
        )

    def order(self, order: Give | Hash | Take) -> None:
        """Begin to carry it out."""
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(order) + b"\n")
        self._process.stdin.flush()

    def answer(self, kind: type[Answer]) -> Answer:
        """Of the order before."""
        assert self._process.stdout is not None
        assert select.select([self._process.stdout], [], [], 2 * WAIT_S)[0], "the rank does not answer"
        return msgspec.json.decode(self._process.stdout.readline(), type=kind)

    def close(self) -> None:
        self._process.kill()
        self._process.wait(WAIT_S)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def make_world(order: RankOrder) -> KVWorld:
    return KVWorld(kv_heads=order.kv_heads, tokens=order.tokens, int8=order.int8)


def make_codec(order: RankOrder) -> Int8Codec | None:
    return Int8Codec("float32") if order.int8 else None


def make_pool(order: RankOrder, *, filled: bool) -> KVPool:
    return make_world(order).pool(
        tp_rank=order.tp_rank, tp_size=order.tp_size, page_size=order.page_size, seed=order.boot, filled=filled
    )


class Giver:
    """A pool and its server."""

    def __init__(self, order: RankOrder) -> None:
        self.pool = make_pool(order, filled=True)
        self.memory = SharedMemory(self.pool.memory.nbytes)
        np.frombuffer(self.memory.view, dtype=np.uint8)[:] = self.pool.memory
        self.server = PageServer(
            memory=self.memory,
            page_bytes=self.pool.page_bytes,
            num_pages=self.pool.memory.nbytes // self.pool.page_bytes,
            layout=str(self.pool.shape),
            shape=self.pool.shape,
            codec=make_codec(order),
            host="127.0.0.1",
            boot=order.boot,
            secret=SECRET,
        )
        self.given = Given(
            PeerAddress(f"rank-{order.tp_rank}", order.boot, "127.0.0.1", 1), self.server.ticket(), self.pool.pages
        )

    def hashes(self, order: Hash) -> list[int]:
        cut = cut_between(self.pool.shape, self.pool.page_bytes, order.shape, order.page_bytes)
        if cut is None:
            return page_checksums(self.memory.view, self.pool.page_bytes, self.pool.pages)
        grains = page_grains(self.pool.pages, cut.source.per_page)
        return PoolGrains(np.frombuffer(self.memory.view, dtype=np.uint8), cut.source).checksums(grains)

    def close(self) -> None:
        self.server.close()
        self.memory.close()


def take(order: Take) -> Taken:
    """Every source at once, as in a cluster."""
    rank = order.rank
    world, pool = make_world(rank), make_pool(rank, filled=False)
    receiver = Receiver(
        page_bytes=pool.page_bytes,
        num_pages=pool.memory.nbytes // pool.page_bytes,
        secret=SECRET,
        layout=str(pool.shape),
        shape=pool.shape,
        codec=make_codec(rank),
        transport=order.transport,
    )
    with closing(receiver):
        memory = np.frombuffer(receiver.memory.view, dtype=np.uint8)
        memory[:] = pool.memory
        for index, source in enumerate(order.sources):
            given, theirs = source.given, source.given.ticket.shape
            assert theirs is not None
            receiver.fetcher.attach(given.address, given.ticket)
            tokens = grain_tokens(theirs.page_size, rank.page_size)
            count = -(-rank.tokens // tokens)
            receiver.start(
                given.address,
                page_grains(given.pages, theirs.page_size // tokens)[:count],
                page_grains(pool.pages, rank.page_size // tokens)[:count],
                key=index,
                checksums=source.checksums[:count],
                grain_tokens=0 if theirs.page_size == rank.page_size else tokens,
            )
        results = [receiver.wait(index) for index in range(len(order.sources))]
        errors = [result.error for result in results if result.error is not None]
        if not errors:
            before, pool.memory[:] = pool.memory.copy(), memory
            world.check(pool)
            world.check_untouched(pool, before, grain=tokens)
        return Taken(errors, sum(result.bytes for result in results), [result.transport for result in results])


def main() -> None:
    giver: Giver | None = None
    for line in sys.stdin.buffer:
        order, answer = _ORDERS.decode(line), None
        if isinstance(order, Give):
            if giver is not None:
                giver.close()
            giver = Giver(order.rank)
            answer = giver.given
        elif isinstance(order, Hash):
            assert giver is not None
            answer = giver.hashes(order)
        else:
            answer = take(order)
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
