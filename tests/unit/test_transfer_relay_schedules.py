"""The random schedules over our TCP through a network that loses, repeats, reorders, changes, delays and cuts.

Handshakes, requests, replies and pages alike, whole, in parts and in 8 bits. What was verified is right, nothing else
is written to, every wait ends by its deadline, and when the network is sound again pages come again.
"""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import msgspec
import numpy as np
import pytest
import xxhash
from faulty_relay import DISTURBANCES, FaultyRelay
from transfer_pools import ServedPool, closing
from transfer_schedules import run_schedules, unharmed
from transfer_world import PAGE, SLOTS, SOURCE_PAGES, World

from protocol.handshake import PoolShape
from transfer.grains import PoolGrains
from transfer.int8_codec import Int8Codec, coded_bytes
from transfer.layout import cut_between, whole_grid


class RelayedPool(ServedPool):
    """A peer behind a faulty network."""

    def __init__(self, *, boot: int, **options) -> None:
        super().__init__(boot=boot, num_pages=SOURCE_PAGES, **{"page_bytes": PAGE, **options})
        self.relay = FaultyRelay((self.ticket.tcp_host, self.ticket.tcp_port))
        self.ticket = msgspec.structs.replace(self.ticket, tcp_port=self.relay.port)

    def close(self) -> None:
        self.relay.close()
        super().close()


class RelayedWorld(World):
    """Its network can fail in any way, so every fetch has a deadline."""

    sound = False
    weights: ClassVar = {**World.weights, **dict.fromkeys(DISTURBANCES, 1), "calm": 2}

    def run(self, operation):
        if operation[0] in DISTURBANCES:
            self.corrupted = True  # without checksums nobody notices
            self.peers[operation[1]].relay.disturb(operation[0])
        else:
            super().run(operation)

    def calm(self, slot):
        self.peers[slot].relay.calm()

    def fetch(self, slot, count, verified, seconds):
        super().fetch(slot, count, verified, seconds or 50)

    def needs_time(self, pool):
        return not self.sound

    def rest(self):
        super().rest()
        self.time(100)
        for peer in self.peers.values():
            peer.relay.calm()
        self.sound = True
        for slot in self.peers:
            self.attach(slot)
            results = [self.demand(slot) for _ in range(2)]  # the first may find a connection from bad times
            self.expect(results[-1].ok, f"nothing comes from {slot} over a sound network: {results}")

    def demand(self, slot):
        key = self.fetches
        self.fetch(slot, 5, True, None)
        self.settle(key)
        return self.answers[key][0]


# ---- parts of pages, and KV in 8 bits ---------------------------------------------------------------------------

OURS = PoolShape(
    model="m", dtype="bfloat16", layers=2, kv_heads=1, page_size=4, head_dim=8, total_kv_heads=2, tp_rank=1, tp_size=2
)
THEIRS = msgspec.structs.replace(OURS, kv_heads=2, tp_rank=0, tp_size=1)
CODEC = Int8Codec("bfloat16")


class PartedPool(RelayedPool):
    """Behind a faulty network too; our pages are parts of its pages, or come in 8 bits, or both."""

    def __init__(self, *, boot: int, shape: PoolShape, codec: Int8Codec | None) -> None:
        super().__init__(boot=boot, page_bytes=PAGE * shape.kv_heads, shape=shape, codec=codec)
        cut = cut_between(shape, self.page_bytes, OURS, PAGE)
        self._grid = whole_grid(OURS, page_bytes=PAGE, tokens=OURS.page_size) if cut is None else cut.source
        self._codec = codec

    def stored(self, page: int) -> np.ndarray:
        packed = np.empty(PAGE, dtype=np.uint8)
        PoolGrains(np.frombuffer(self.memory.view, dtype=np.uint8), self._grid).gather((page,), packed)
        return packed

    def page(self, page: int) -> bytes:
        packed = self.stored(page)
        if self._codec is not None:
            coded = np.empty(coded_bytes(self._grid, "bfloat16"), dtype=np.uint8)
            self._codec.encode(self._grid, packed, coded)
            self._codec.decode(self._grid, coded, packed)
        return packed.tobytes()

    def checksums(self, pages) -> list[int]:
        return [xxhash.xxh3_64_intdigest(self.stored(page)) for page in pages]


class PartedWorld(RelayedWorld):
    """What is verified here, is so before it is in its place: pages hold what they held or what they should."""

    def __init__(self, *args, **options) -> None:
        self.before: dict[int, dict[int, bytes]] = {}
        super().__init__(*args, **options)

    def fetch(self, slot, count, verified, seconds):
        self.before[self.fetches] = dict(self.settled)
        super().fetch(slot, count, verified, seconds)

    def settle(self, key):
        job, pool = self.running[key]
        super().settle(key)
        if job.checksums:
            for source, target in zip(job.source_pages, job.target_pages, strict=True):
                may_be = (self.before[key][target], pool.page(source))
                self.expect(self.settled[target] in may_be, f"page {target} of fetch {key} was not verified")


class SealedWorld(PartedWorld):
    """In 8 bits everything is verified, with checksums or without."""

    corrupted = property(lambda self: False, lambda self, value: None)


KINDS = {
    "pages": (RelayedPool, {}, RelayedWorld, {}),
    "parts": (PartedPool, {"shape": THEIRS, "codec": None}, PartedWorld, {"shape": OURS}),
    "int8": (PartedPool, {"shape": OURS, "codec": CODEC}, SealedWorld, {"shape": OURS, "codec": CODEC}),
    "int8 parts": (PartedPool, {"shape": THEIRS, "codec": CODEC}, SealedWorld, {"shape": OURS, "codec": CODEC}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("error")  # also of a thread that died
def test_random_schedules_over_a_faulty_network(caplog, kind):
    pool_of, pool_options, world_of, options = KINDS[kind]
    with unharmed(caplog), closing(*(pool_of(boot=slot, **pool_options) for slot in SLOTS)) as pools:
        peers = {pool.address.boot: pool for pool in pools}
        run_schedules(lambda choose: world_of(peers, transport="tcp", **options), 150 if kind == "pages" else 70)
        done = Counter(how for pool in pools for how in pool.relay.done)
    assert min(done[how] for how in DISTURBANCES) > 5, done
