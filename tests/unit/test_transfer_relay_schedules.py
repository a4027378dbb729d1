"""The random schedules over our TCP through a network that loses, repeats, reorders, changes, delays and cuts.

Handshakes, requests, replies and pages alike, whole, in parts and in 8 bits. What was verified is right, nothing else
is written to, every wait ends by its deadline, and when the network is sound again pages come again.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import ClassVar

import msgspec
import pytest
from faulty_relay import DISTURBANCES, FaultyRelay
from parted_pool import CODEC, OURS, THEIRS, PartedPool
from transfer_pools import ServedPool, closing
from transfer_schedules import run_schedules, unharmed
from transfer_world import PAGE, SLOTS, SOURCE_PAGES, World


class Relayed:
    """`pool` behind a faulty network; closes it."""

    def __init__(self, pool: ServedPool) -> None:
        self._pool = pool
        self.relay = FaultyRelay((pool.ticket.tcp_host, pool.ticket.tcp_port))
        self.address = pool.address
        self.ticket = msgspec.structs.replace(pool.ticket, tcp_port=self.relay.port)
        self.page, self.checksums = pool.page, pool.checksums

    def close(self) -> None:
        self.relay.close()
        self._pool.close()


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


PARTS = {"shape": OURS, "lands_verified": True}
SEALED = {**PARTS, "codec": CODEC, "seals": True}
KINDS = {
    "pages": (partial(ServedPool, num_pages=SOURCE_PAGES, page_bytes=PAGE), {}),
    "parts": (partial(PartedPool, shape=THEIRS, codec=None), PARTS),
    "int8": (partial(PartedPool, shape=OURS, codec=CODEC), SEALED),
    "int8 parts": (partial(PartedPool, shape=THEIRS, codec=CODEC), SEALED),
}
"""Peers, and what goes for the world of them."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("error")  # also of a thread that died
def test_random_schedules_over_a_faulty_network(caplog, kind):
    pool_of, options = KINDS[kind]
    with unharmed(caplog), closing(*(Relayed(pool_of(boot=slot)) for slot in SLOTS)) as pools:
        peers = {pool.address.boot: pool for pool in pools}
        run_schedules(lambda choose: RelayedWorld(peers, transport="tcp", **options), 150 if kind == "pages" else 70)
        done = Counter(how for pool in pools for how in pool.relay.done)
    assert min(done[how] for how in DISTURBANCES) > 5, done
