"""The random schedules over mooncake-transfer-engine's TCP: few and long ones, because each begins with the start of a
process."""

from __future__ import annotations

import logging

import pytest
from mooncake_library import needs_library
from transfer_pools import ServedPool, closing, pattern
from transfer_schedules import run_schedules, unharmed
from transfer_world import PAGE, SLOTS, SOURCE_PAGES, World

pytestmark = needs_library


@pytest.fixture
def pools(monkeypatch):
    monkeypatch.setattr("transfer.mooncake.transport._BLOCK_BYTES", 3 * PAGE)
    monkeypatch.setattr("transfer.mooncake.transport._SHORT_RUN_BYTES", 0)
    sizes = {"page_bytes": PAGE, "num_pages": SOURCE_PAGES}
    with closing(*(ServedPool(boot=slot, transport="mooncake", **sizes) for slot in SLOTS)) as pools:
        yield {pool.address.boot: pool for pool in pools}


@pytest.mark.filterwarnings("error")  # also of a thread that died
def test_random_schedules_by_mooncake(pools, caplog):
    num_right = 0

    class Counting(World):
        def close(self):
            nonlocal num_right
            super().close()
            num_right += self.right.get("mooncake", 0)

    with unharmed(caplog, quiet=logging.WARNING):
        run_schedules(lambda choose: Counting(pools, transport="mooncake"), 20, length=200)
    assert num_right > 10
    for boot, pool in pools.items():
        assert bytes(pool.memory.view) == pattern(boot, PAGE * SOURCE_PAGES).tobytes()
