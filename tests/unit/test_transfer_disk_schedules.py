"""The random schedules by way of a folder: pages are offered late, or never."""

from __future__ import annotations

import logging

import pytest
from disk_peer import SpoolingPool
from transfer_pools import WAIT_S, closing, pattern
from transfer_schedules import run_schedules, unharmed
from transfer_world import PAGE, SLOTS, SOURCE_PAGES, World

from transfer.disk.packs import SpoolLimits


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr("transfer.disk.transport._BLOCK_BYTES", 3 * PAGE)
    monkeypatch.setattr("transfer.disk.spool._PACK_BYTES", 4 * PAGE)
    monkeypatch.setattr("transfer.disk.packs._SLACK_RECORDS", 8)


@pytest.fixture
def pools(tmp_path, small_pieces):
    limits = SpoolLimits(max_bytes=20 * PAGE)  # less than a pool holds: pages go, and come again
    sizes = {"page_bytes": PAGE, "num_pages": SOURCE_PAGES}
    with closing(*(SpoolingPool(tmp_path, boot=slot, limits=limits, **sizes) for slot in SLOTS)) as pools:
        yield {pool.address.boot: pool for pool in pools}


class DiskWorld(World):
    """Offers what is fetched; while an answer is waited for, time passes."""

    def checksums(self, pool, sources, verified):
        """Where other transports would not verify, the last page is never offered."""
        pool.offer(sources[: len(sources) - (not verified)])
        return pool.checksums(sources)

    def settle(self, key):
        self.go()
        assert self.running[key][1].spool.wait_idle(WAIT_S)
        super().settle(key)

    def needs_time(self, pool):
        return True

    def close(self):
        super().close()
        (transport,) = self.fetcher._transports
        assert transport._waits == {}, "a copy ended, and its wait did not"


@pytest.mark.filterwarnings("error")  # also of a thread that died
def test_random_schedules_by_disk(pools, tmp_path, caplog):
    num_right = 0

    class Counting(DiskWorld):
        def close(self):
            nonlocal num_right
            super().close()
            num_right += self.right.get("disk", 0)

    with unharmed(caplog, quiet=logging.WARNING):
        run_schedules(lambda choose: Counting(pools, transport="disk", folder=tmp_path), 600)
    assert num_right > 50
    for boot, pool in pools.items():
        assert bytes(pool.memory.view) == pattern(boot, PAGE * SOURCE_PAGES).tobytes()
