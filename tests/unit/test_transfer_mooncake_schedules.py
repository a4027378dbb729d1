"""The random schedules of `test_transfer_schedules.py` over mooncake-transfer-engine's TCP: few and long ones, because
each begins with the start of a process."""

from __future__ import annotations

import itertools
import logging
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mooncake_library import needs_library
from test_transfer_schedules import BOOTS, PAGE, SOURCE_PAGES, World, operations
from transfer_pools import ServedPool, closing, pattern

pytestmark = needs_library


@pytest.fixture
def pools(monkeypatch):
    monkeypatch.setattr("transfer.mooncake.transport._BLOCK_BYTES", 3 * PAGE)
    sizes = {"page_bytes": PAGE, "num_pages": SOURCE_PAGES}
    with closing(*(ServedPool(boot=boot, transport="mooncake", **sizes) for boot in BOOTS)) as pools:
        yield {pool.address.boot: pool for pool in pools}


class MooncakeWorld(World):
    """Counts the fetches that mooncake itself brought to a good end."""

    num_right = 0

    def settle(self, key):
        super().settle(key)
        result = self.answers[key][0]
        MooncakeWorld.num_right += bool(result.ok and result.transport == "mooncake")


@pytest.mark.filterwarnings("error")  # also of a thread that died
def test_random_schedules_by_mooncake(pools, caplog):
    @settings(max_examples=20, deadline=None, derandomize=True, database=None)
    @given(st.lists(operations, min_size=8, max_size=8), st.integers(1, 3))
    def schedules(parts, num_threads):
        world = MooncakeWorld(pools, "mooncake", num_threads)
        try:
            for operation in itertools.chain(*parts):
                world.run(operation)
        finally:
            world.close()

    before = threading.active_count()
    schedules()
    assert MooncakeWorld.num_right > 10
    assert threading.active_count() == before
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    for boot, pool in pools.items():
        assert bytes(pool.memory.view) == pattern(boot, PAGE * SOURCE_PAGES).tobytes()
