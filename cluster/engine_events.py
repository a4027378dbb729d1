"""What others leave in the engine thread's inbox (`cluster/engine_thread.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.grammar_gate import GrammarReady
from protocol.codec import AnyMessage
from protocol.handshake import LinkRole
from transfer.fetcher import FetchResult


@dataclass(frozen=True)
class LinkUp:
    """A router or a decode replica has connected."""

    link_id: str
    role: LinkRole


@dataclass(frozen=True)
class LinkLost:
    link_id: str


@dataclass(frozen=True)
class Received:
    link_id: str
    message: AnyMessage


@dataclass(frozen=True)
class Call:
    """Run this there."""

    run: Callable[[], None]


Event = LinkUp | LinkLost | Received | FetchResult | GrammarReady | Call
