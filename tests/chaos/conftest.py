"""Live clusters, one for each module that asks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest
from live_cluster import LiveCluster

REQUEST_S = 120.0
"""No request may take longer, whatever is done to the cluster: a hang fails the test."""


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveCluster]:
    """The cluster that the module's `SETTINGS` describe."""
    live = LiveCluster.start(request.module.SETTINGS, tmp_path_factory.mktemp("cluster"))
    yield live
    live.stop()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(total=REQUEST_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session
