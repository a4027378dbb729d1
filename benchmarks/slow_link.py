"""Ways to a benchmark's peer: the loopback, or a link of limited speed into a network namespace.

The loopback has no speed of its own: what it carries, this machine's processors copy at both ends, which is also what
they are measured by. Behind a link of the speed of a network card the peer is as far away as another host would be.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

_HERE, _THERE = "198.18.0.1", "198.18.0.2"  # of the range that is set aside for benchmarks (RFC 2544)
_BURST, _QUEUE = "1mb", "64mb"  # no packet is dropped: a sender's window is smaller


@dataclass(frozen=True, kw_only=True)
class Link:
    here: str
    """Our address on it."""
    there: str
    """The peer's."""
    command: Sequence[str] = ()
    """What a command is preceded by that runs at the peer's end."""


LOOPBACK = Link(here="127.0.0.1", there="127.0.0.1")


@contextmanager
def slow_link(gbit: float) -> Iterator[Link]:
    """A link of `gbit` Gbit/s each way, for as long as the context lasts. Needs Linux, root and iproute2.

    Raises `subprocess.CalledProcessError` where it cannot be made.
    """
    space, near, far = (f"pd{os.getpid()}{end}" for end in ("", "a", "b"))
    within = ("ip", "netns", "exec", space)
    limit = ("root", "tbf", "rate", f"{gbit}gbit", "burst", _BURST, "limit", _QUEUE)
    _run("ip", "netns", "add", space)
    try:
        _run("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", space)
        for prefix, device, address in (((), near, _HERE), (within, far, _THERE)):
            _run(*prefix, "ip", "address", "add", f"{address}/30", "dev", device)
            _run(*prefix, "ip", "link", "set", device, "up")
            _run(*prefix, "tc", "qdisc", "add", "dev", device, *limit)
        _run(*within, "ip", "link", "set", "lo", "up")
        yield Link(here=_HERE, there=_THERE, command=within)
    finally:
        _run("ip", "netns", "delete", space)  # the link goes with it


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
