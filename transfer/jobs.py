"""What a fetch is asked to do, what it answers, and the states in between.

A `FetchJob` becomes one `PageCopy` per attempt: the attempt of one transport at it. A transport calls `on_ended`
exactly once for every copy it was given, after the last byte it will ever write for it. Everything the fetcher
promises about drained pages rests on that sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from protocol.handshake import RegionTicket
from protocol.rooms import PeerAddress
from transfer.faults import CopySite
from transfer.int8_codec import Int8Codec
from transfer.layout import Cut
from transfer.spans import Pages, checked_pages


@dataclass(frozen=True, kw_only=True)
class FetchJob:
    """Take `source_pages[i]` of `peer` into our `target_pages[i]`, for every i.

    Between pools of unequal page size these are not pages but grains (`layout.py`) of `grain_tokens` tokens. Of pools
    that hold different KV heads, the heads they have in common move.
    """

    key: Hashable
    """Names the job until it is done; free for another one from then on."""
    peer: PeerAddress
    source_pages: Sequence[int]
    target_pages: Sequence[int]
    checksums: Sequence[int] = ()
    """xxh3-64 of each page or grain, verified in our memory before the job is done; empty, or 0: not verified."""
    grain_tokens: int = 0
    """0 where page sizes are equal."""
    deadline: float = float("inf")
    """On the fetcher's clock."""


def checked_targets(job: FetchJob, *, num_pages: int) -> Pages:
    """The job's target pages, in our own pool of `num_pages` pages. Raises `ValueError` for what the caller got
    wrong."""
    count = len(job.target_pages)
    if len(job.source_pages) != count or len(job.checksums) not in (0, count):
        raise ValueError(
            f"{len(job.source_pages)} source pages and {len(job.checksums)} checksums for {count} target pages"
        )
    targets = checked_pages(job.target_pages, num_pages=num_pages, whose="our")
    named = np.zeros(num_pages, dtype=np.bool_)
    named[targets] = True
    twice = count - np.count_nonzero(named)
    if twice:
        raise ValueError(f"{twice} of {count} target pages are named twice")
    return targets


@dataclass(frozen=True, kw_only=True)
class FetchResult:
    """The end of a job: no byte is written for it any more."""

    key: Hashable
    peer: PeerAddress
    ok: bool
    """All pages are there and verified."""
    error: str | None
    """What went wrong, on every path that was tried; None when `ok`."""
    cancelled: bool
    """It ended because of `cancel`."""
    bytes: int
    """Bytes of the pages asked for."""
    seconds: float
    """From the first to the last byte of the last attempt; 0 when none began."""
    queued_seconds: float
    """From `fetch` until the last attempt began (or the end, when none did)."""
    transport: str
    """Of the last attempt; empty when there was none."""


OnDone = Callable[[FetchResult], None]


@dataclass(frozen=True, kw_only=True)
class Coded:
    """Pages, or what they are taken apart into, in 8 bits on the way."""

    cut: Cut
    codec: Int8Codec


@dataclass(kw_only=True, eq=False)
class Peer:
    """One attachment of one life of a peer. Compared by identity: attached again, it is another one."""

    address: PeerAddress
    ticket: RegionTicket
    """The only thing that is ever replaced, when the peer's doors move."""
    cut: Cut | None = None
    """How its pages are taken apart; None when they are taken whole."""
    coded: Coded | None = None
    """How they are taken in 8 bits by transports that can do that; None when they are taken as they are stored."""

    @property
    def num_pages(self) -> int:
        """Of its pool, in what jobs count: pages or grains."""
        return self.ticket.num_pages * (1 if self.cut is None else self.cut.source.per_page)


def counted_tokens(peer: Peer | None) -> int:
    """Of the grains that jobs from `peer` count in; 0 where they count pages."""
    return 0 if peer is None or peer.cut is None else peer.cut.counted_tokens


def checked_sources(job: FetchJob, peer: Peer, *, verify: bool) -> Pages:
    """The job's source pages, in the peer's pool; with `verify` each has a checksum. Raises `ValueError` for what the
    peer got wrong."""
    count, tokens = len(job.source_pages), counted_tokens(peer)
    if count > peer.num_pages:
        raise ValueError(f"{count} pages asked for, of a peer's pool of {peer.num_pages}")
    if job.grain_tokens != tokens:
        raise ValueError(
            f"the job counts in grains of {job.grain_tokens} tokens, pages are taken in grains of {tokens}"
        )
    if verify and (0 in job.checksums or len(job.checksums) < count):
        raise ValueError(
            f"replica {peer.address.replica_id} offers pages without checksums, and this one takes none such; "
            "set transfer.checksum alike on both"
        )
    return checked_pages(job.source_pages, num_pages=peer.num_pages, whose="the peer's")


@dataclass(kw_only=True, eq=False)
class PageCopy:
    """One transport's attempt at one job; its pages may be grains. `stop_requested` is set by `Transport.stop`, before
    all else it does."""

    job: FetchJob
    peer: Peer
    sources: Pages
    targets: Pages
    """The job's lists of pages, as arrays."""
    page_bytes: int
    """Of a grain, where the peer's pages are taken apart."""
    queued_at: float
    on_ended: Callable[[PageCopy, str | None], None]
    """Called once, by the transport: None when all pages landed and are verified, else what went wrong."""
    stop_requested: bool = False
    started_at: float | None = None
    done_pages: int = 0
    """Landed and verified, in the order of the job."""

    @property
    def num_pages(self) -> int:
        return len(self.targets)

    @property
    def total_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    def site(self, transport: str) -> CopySite:
        return CopySite(
            key=self.job.key,
            peer=self.peer.address,
            transport=transport,
            done_bytes=self.done_pages * self.page_bytes,
            total_bytes=self.total_bytes,
        )
