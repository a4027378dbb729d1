"""Requests that schemathesis makes up from a cluster's own OpenAPI document."""

from __future__ import annotations

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error

_REQUEST_S = 60.0
_DEADLINE = {"X-Request-Timeout": "20"}
"""A chat without max_tokens may go on until the context is full, which is slow and no hang: it has to be answered."""


def every_operation_answers(url: str, *, examples: int) -> int:
    """Send `examples` requests to each operation of the server at `url`; returns the number of operations.

    Raises AssertionError for an answer with a 5xx status, a timeout for one that does not come, and when the server is
    not healthy afterwards.
    """
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def every_case(case: schemathesis.Case) -> None:
            case.call_and_validate(headers=_DEADLINE, timeout=_REQUEST_S, checks=[not_a_server_error])

        every_case()
    assert requests.get(f"{url}/health", timeout=_REQUEST_S).json()["status"] == "ok"
    return len(operations)
