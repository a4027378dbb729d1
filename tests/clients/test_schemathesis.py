"""schemathesis over our own OpenAPI document: what it makes up is answered, never with a 5xx, never not at all."""

from __future__ import annotations

import pytest
from live_cluster import LiveCluster
from made_up_requests import every_operation_answers

pytestmark = pytest.mark.clients


def test_no_request_made_from_the_document_fails_or_hangs(cluster: LiveCluster) -> None:
    assert every_operation_answers(cluster.url, examples=60) > 10
