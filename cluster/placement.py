"""Whether the nodes that Ray knows can hold what a configuration asks for.

Serve waits without a word for resources that are not there: right where an autoscaler may bring them, and a riddle on a
machine that will never have them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from cluster.config import ClusterConfig
from cluster.config_sections import ReplicaSection

_ROUNDING = 1e-6
"""Of sums of fractions."""


def shortfalls(config: ClusterConfig, available: Mapping[str, float]) -> list[str]:
    """One line for each resource of which the (resolved) configuration's pools need more than is `available`.

    `available` is as `ray.cluster_resources()` tells it. Fragmentation over nodes is not looked at.
    """
    needs = {name: _needs(section) for name, section in config.pools.items()}
    total: Counter[str] = Counter()
    for need in needs.values():
        total.update(need)
    lines = []
    for resource, needed in sorted(total.items()):
        have = available.get(resource, 0.0)
        if needed <= have + _ROUNDING:
            continue
        parts = ", ".join(
            f"{name} {need[resource]:g} ({_replicas(config.pools[name].num_replicas)})"
            for name, need in needs.items()
            if resource in need
        )
        lines.append(f"{resource}: {needed:g} needed, {have:g} there; {parts}")
    return lines


def _replicas(count: int) -> str:
    return f"{count} replica" if count == 1 else f"{count} replicas"


def _needs(section: ReplicaSection) -> dict[str, float]:
    assert section.num_cpus != "auto", "a resolved configuration"
    each = {"CPU": section.num_cpus, "GPU": section.num_gpus, **section.resources}
    return {resource: amount * section.num_replicas for resource, amount in each.items() if amount > 0}
