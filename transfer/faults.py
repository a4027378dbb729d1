"""The fault seam: where tests make transfers slow, wrong or impossible.

A `PageFetcher` that was given `Faults` calls it from the transfer threads around every piece of bytes it writes. In
production there is none, and nothing is called.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

from protocol.rooms import PeerAddress


class InjectedFault(Exception):
    """Raised by `Faults` to fail the attempt at hand, as a broken connection would."""


@dataclass(frozen=True, kw_only=True)
class CopySite:
    """Where a copy stands when the seam is called."""

    key: Hashable
    peer: PeerAddress
    transport: str
    done_bytes: int
    total_bytes: int


class Faults(Protocol):
    """Both may block (a delay, on whatever clock), or raise `InjectedFault` (a drop, a broken path)."""

    def before_copy(self, site: CopySite) -> None:
        """The next bytes of the copy are about to be written into our pages."""

    def after_copy(self, site: CopySite, landed: memoryview) -> None:
        """`landed` was just written and is not verified yet; changing it is a corruption on the way."""
