"""schemathesis over our own OpenAPI document: what it makes up is answered, never with a 5xx, never not at all."""

from __future__ import annotations

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from live_cluster import LiveCluster
from schemathesis.checks import not_a_server_error

pytestmark = pytest.mark.clients

REQUEST_S = 60.0
EXAMPLES = 40
"""Of each operation."""


def test_no_request_made_from_the_document_fails_or_hangs(cluster: LiveCluster) -> None:
    schema = schemathesis.openapi.from_url(f"{cluster.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) > 10
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def every_case(case: schemathesis.Case) -> None:
            case.call_and_validate(timeout=REQUEST_S, checks=[not_a_server_error])

        every_case()
    assert requests.get(f"{cluster.url}/health", timeout=REQUEST_S).json()["status"] == "ok"
