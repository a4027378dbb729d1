"""Ray's node on this machine, used as soon as it is there.

`ray.init` asks once a second whether the node that it started has registered: half a second lost on average, of the few
that a small cluster takes to serve. Ray 2.60 has no setting for this, so the method before that wait is made to return
only when the node is registered. In a Ray that has no such method nothing is changed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

_PATIENCE_S = 30.0  # as long as Ray has
_PERIOD_S = 0.02
_STARTS_NODE = "start_ray_processes"


@contextlib.contextmanager
def noticed_at_once() -> Iterator[None]:
    """While it lasts, `ray.init` goes on as soon as its node is registered."""
    from ray._private.node import Node

    original = getattr(Node, _STARTS_NODE, None)
    if original is None:
        yield
        return

    def start_and_wait(node: Any) -> None:
        original(node)
        with contextlib.suppress(Exception):  # whatever is wrong, Ray is about to say it better
            wait_until_registered(node.get_gcs_client())

    setattr(Node, _STARTS_NODE, start_and_wait)
    try:
        yield
    finally:
        setattr(Node, _STARTS_NODE, original)


def wait_until_registered(client: Any) -> None:
    """Until `client`, one of Ray's control store, knows a node; gives up after 30 s."""
    deadline = time.monotonic() + _PATIENCE_S
    while not client.get_all_node_info(timeout=_PATIENCE_S) and time.monotonic() < deadline:
        time.sleep(_PERIOD_S)
