"""One live cluster for all client libraries, which are what is tested. `make test-clients` runs them."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from live_cluster import LiveCluster

from cluster.model_folder import EMBEDDED, model_folder

collect_ignore_glob = [] if find_spec("lm_eval") else ["test_*.py"]
"""Without the extra `clients` there is nothing to test with."""

SETTINGS = {"model": {"dtype": "float32"}}
"""The precision of the references that answers are compared with."""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveCluster]:
    live = LiveCluster.start(SETTINGS, tmp_path_factory.mktemp("cluster"))
    yield live
    live.stop()


@pytest.fixture(scope="session")
def api(cluster: LiveCluster) -> str:
    """The base URL as client libraries want it."""
    return f"{cluster.url}/v1"


@pytest.fixture(scope="session")
def folder() -> Path:
    """The served model's folder."""
    return model_folder(EMBEDDED)
