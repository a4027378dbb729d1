"""Worlds of random schedules whose peers are real processes, killed, stopped and replaced between any two steps."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import ClassVar

from peer_processes import Nursery, PeerProcess
from transfer_world import SLOTS, SOURCE_PAGES, World

from transfer.choice import TransportName, is_written_by_helpers
from transfer.memory import SharedMemory

PAGE_BYTES: dict[TransportName, int] = {
    "shm": 1 << 20,
    "tcp": 1 << 20,  # a long fetch does not fit the sockets' buffers
    "disk": 64 << 10,
    "mooncake": 1 << 20,
    "gloo": 1 << 20,
}


class Fleet:
    """A peer in each slot. `close` ends them all."""

    def __init__(self, transport: TransportName, folder: Path) -> None:
        self.transport: TransportName = transport
        self.page_bytes = PAGE_BYTES[transport]
        self.folder = folder if transport == "disk" else None
        self.nursery = Nursery()
        self._boots = itertools.count(1)
        self.peers: dict[int, PeerProcess] = {}
        self.restore()

    def restore(self) -> None:
        """Let those go on that are stopped, and replace those that are dead."""
        for slot in SLOTS:
            if slot not in self.peers or not self.peers[slot].is_alive:
                self.replace(slot)
            elif self.peers[slot].is_stopped:
                self.peers[slot].resume()

    def replace(self, slot: int) -> None:
        """The next life in this slot."""
        if slot in self.peers:
            self.peers[slot].close()
        self.peers[slot] = PeerProcess(
            boot=next(self._boots),
            page_bytes=self.page_bytes,
            num_pages=SOURCE_PAGES,
            transport=self.transport,
            folder=self.folder,
            nursery=self.nursery,
        )

    def close(self) -> None:
        for peer in self.peers.values():
            peer.close()
        self.nursery.close()


class ProcessWorld(World):
    """Its peers can be stopped and killed, so every fetch has a deadline."""

    weights: ClassVar = {**World.weights, "kill": 1, "stop": 1, "resume": 1, "restart": 1}

    def __init__(self, fleet: Fleet, **options) -> None:
        self.fleet = fleet
        self.page_bytes = fleet.page_bytes
        super().__init__(fleet.peers, transport=fleet.transport, folder=fleet.folder, **options)

    def make_memory(self, nbytes):
        writable = is_written_by_helpers(self.fleet.transport)
        memory = SharedMemory(nbytes, prefault=False, shared_writable=writable)
        return memory, memory.view

    def fetch(self, slot, count, verified, seconds):
        super().fetch(slot, count, verified, seconds or 200)

    def kill(self, slot):
        self.meet()
        if self.peers[slot].is_alive:
            self.peers[slot].kill()

    def stop(self, slot):
        self.meet()
        if self.peers[slot].is_alive and not self.peers[slot].is_stopped:
            self.peers[slot].stop()

    def resume(self, slot):
        if self.peers[slot].is_stopped:
            self.peers[slot].resume()

    def restart(self, slot):
        """Its link breaks, it is detached, and another life of it is heard of."""
        self.meet()
        before = self.peers[slot].address
        self.fleet.replace(slot)
        self.fetcher.detach(before)
        self.attach(slot)

    def checksums(self, pool, sources, verified):
        if self.fleet.transport != "disk":
            return super().checksums(pool, sources, verified)
        with contextlib.suppress(OSError):  # it is dead
            pool.offer(sources[: len(sources) - (not verified)])
        return pool.checksums(sources)

    def needs_time(self, pool):
        return self.fleet.transport in ("disk", "gloo") or pool.is_stopped or not pool.is_alive

    def rest(self):
        super().rest()
        self.recover()
        for slot, peer in self.peers.items():
            self.expect(peer.is_unchanged(), f"the pages of the peer in slot {slot} have changed")

    def recover(self) -> None:
        """With every peer whole again, each gives what is asked of it."""
        lost = {slot: peer.address for slot, peer in self.peers.items() if not peer.is_alive}
        self.fleet.restore()
        for address in lost.values():
            self.fetcher.detach(address)
        self.time(100)  # no grudge lasts longer
        for slot in self.peers:
            self.attach(slot)
            self.demand(slot)

    def demand(self, slot: int) -> str:
        """Fetch from a healthy peer; the transport that did it. A busy machine can be late with a handshake or two."""
        for _ in range(3):
            key = self.fetches
            self.fetch(slot, 5, True, None)
            self.settle(key)
            result, _ = self.answers[key]
            if result.ok:
                break
        self.expect(result.ok, f"the healthy peer in slot {slot} gives nothing: {result.error}")
        return result.transport
