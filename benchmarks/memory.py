"""Memory of a whole cluster: the sum of the proportional set sizes (PSS) of its processes.

PSS divides every shared page among those that map it, so KV pools that replicas map from each other, shared libraries
and forked pages count once. `python -m benchmarks.memory --root PID` counts PID and all processes below it; for a
cluster that is the `cluster.launch` process.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.report import Report, Table, add_report_options, finish
from cluster.process_tree import descendants

MIB = 1 << 20


def pss_by_name(pids: Iterable[int]) -> dict[str, list[int]]:
    """PSS in bytes of each living process, under a short name of what it runs. Linux only."""
    groups: dict[str, list[int]] = defaultdict(list)
    for pid in pids:
        try:
            groups[_short_name(pid)].append(_pss(pid))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
    return groups


def total_pss(pids: Iterable[int]) -> int:
    """The sum of the PSS of those of the processes that live, in bytes."""
    return sum(sum(sizes) for sizes in pss_by_name(pids).values())


def memory_table(groups: Mapping[str, Sequence[int]]) -> Table:
    """What `pss_by_name` found, largest first, with the sum below."""
    table = Table(title="Memory", columns=["process", "count", "PSS (MiB)"])
    for name, sizes in sorted(groups.items(), key=lambda group: -sum(group[1])):
        table.add(name, len(sizes), round(sum(sizes) / MIB))
    everything = [size for sizes in groups.values() for size in sizes]
    table.add("all", len(everything), round(sum(everything) / MIB))
    return table


def _pss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def _short_name(pid: int) -> str:
    """`ray::Replica` or `dashboard.py` rather than a whole command line."""
    words = [word for word in Path(f"/proc/{pid}/cmdline").read_text().split("\0") if word]
    if not words:
        return f"pid {pid}"
    if words[0].startswith("ray"):
        return words[0].split("(")[0].strip()
    if "-m" in words[:-1]:
        return words[words.index("-m") + 1]
    scripts = [word for word in words if word.endswith(".py")]
    return (scripts[0] if scripts else words[0]).rpartition("/")[2]


def main() -> None:
    parser = argparse.ArgumentParser(description="sum of PSS of a cluster's processes")
    parser.add_argument("--root", type=int, required=True, action="append", help="count this process and all below it")
    add_report_options(parser)
    arguments = parser.parse_args()
    pids = set(arguments.root).union(*map(descendants, arguments.root))
    report = Report(
        name="memory",
        purpose="Proportional set size of every process of a cluster.",
        configuration={"root processes": len(arguments.root)},
        tables=[memory_table(pss_by_name(pids))],
    )
    finish(report, arguments)


if __name__ == "__main__":
    main()
