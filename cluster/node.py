"""This node, as Ray's other nodes know it."""

from __future__ import annotations

import ray


def node_address() -> str:
    """The address they reach it at, which is not always that of the first network card."""
    node_id = ray.get_runtime_context().get_node_id()
    (address,) = (node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == node_id)
    return str(address)
