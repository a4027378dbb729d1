"""Streams between routers: a stream moves to the router to which its client has come back.

Every router listens for links of the others, under the cluster secret as replicas do. A claim takes one short link:
claims are rare. Where the others are comes from the directory, every second.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from protocol.codec import AnyMessage
from protocol.endpoints import Identity, LinkServer, connect
from protocol.link import Link, LinkError, LinkTimings
from protocol.membership import RouterReport
from protocol.rooms import PeerAddress
from protocol.streams import ClaimStream, NoStream, StreamState
from router.errors import ApiError, overloaded
from router.streams.record import StreamRecord
from router.streams.shelf import Gone, Shelf, StreamBusyError

_CLAIM_S = 10.0
_MOST_HOPS = 8
_MOST_BYTES = 60 << 20
"""What fits one frame."""

_LOGGER = logging.getLogger(__name__)


class StreamLostError(ApiError):
    """The stream's log went with its router."""

    def __init__(self) -> None:
        message = "the router that had the stream is gone, and its log with it; send the request again"
        super().__init__(410, message, code="stream_gone")


class StreamMoves:
    """Lifecycle: `start`, then `claim` at any time, `close`."""

    def __init__(
        self, shelf: Shelf, *, router_key: str, secret: bytes, identity: Identity, timings: LinkTimings
    ) -> None:
        self._shelf = shelf
        self._router_key = router_key
        self._secret = secret
        self._identity = identity
        self._timings = timings
        self._peers: dict[str, PeerAddress] = {}
        self._answers: set[asyncio.Task[None]] = set()
        self._server = LinkServer(
            secret=secret,
            replica_id=identity.peer_id,
            boot=identity.boot,
            region=None,
            on_up=lambda link: None,
            on_message=self._asked,
            on_lost=lambda link, why: None,
            timings=timings,
        )

    @property
    def address(self) -> PeerAddress:
        """Where the other routers reach this one."""
        return self._server.address

    async def start(self, host: str) -> None:
        await self._server.start(host=host)

    async def close(self) -> None:
        self._server.close()
        for task in self._answers:
            task.cancel()
        await asyncio.gather(*self._answers, return_exceptions=True)

    def take_reports(self, reports: Iterable[RouterReport]) -> None:
        """The other routers that live."""
        self._peers = {report.key: report.address for report in reports}

    async def claim(self, token: str, tenant: str, *, owner: str) -> StreamRecord:
        """The stream, wherever it is; raises `ApiError` (404, 410, 503) where there is none to be had."""
        if owner == self._router_key or owner in self._peers:
            return await self._follow(token, tenant, owner)
        for key in (self._router_key, *self._peers):  # it may have moved before its first router went
            found = await self._ask(key, token, tenant)
            if isinstance(found, StreamRecord):
                return found
        raise StreamLostError

    async def _follow(self, token: str, tenant: str, owner: str) -> StreamRecord:
        """Ask the owner, and then wherever it says that the stream has gone."""
        asked = owner
        for _ in range(_MOST_HOPS):
            found = await self._ask(asked, token, tenant)
            if isinstance(found, StreamRecord):
                return found
            if found is None:
                raise ApiError(404, "there is no such stream; check its id, and the key", code="stream_not_found")
            if not found.moved_to:
                if found.why:
                    raise ApiError(410, found.why, code="stream_not_kept")
                message = "the stream has been kept for as long as streams are; send the request again"
                raise ApiError(410, message, code="stream_gone")
            if found.moved_to != self._router_key and found.moved_to not in self._peers:
                raise StreamLostError
            asked = found.moved_to
        raise overloaded(503, "the stream moves from router to router; try again", code="stream_busy", retry_after_s=1)

    async def _ask(self, key: str, token: str, tenant: str) -> StreamRecord | Gone | None:
        if key == self._router_key:
            return await self._here(token, tenant)
        return await self._there(self._peers[key], token, tenant)

    async def _here(self, token: str, tenant: str) -> StreamRecord | Gone | None:
        try:
            return await self._shelf.take(token, tenant)
        except StreamBusyError as error:
            message = "the stream is still being written to an earlier connection; try again"
            raise overloaded(503, message, code="stream_busy", retry_after_s=1) from error

    async def _there(self, address: PeerAddress, token: str, tenant: str) -> StreamRecord | Gone | None:
        answered: asyncio.Future[AnyMessage] = asyncio.get_running_loop().create_future()

        def on_message(link: Link, message: AnyMessage) -> None:
            if not answered.done():
                answered.set_result(message)

        def on_lost(link: Link, why: str) -> None:
            if not answered.done():
                answered.set_exception(LinkError(why))

        try:
            async with asyncio.timeout(_CLAIM_S):
                link = await connect(
                    address,
                    secret=self._secret,
                    identity=self._identity,
                    on_message=on_message,
                    on_lost=on_lost,
                    timings=self._timings,
                )
                try:
                    link.send(ClaimStream(token, tenant, self._router_key))
                    answer = await answered
                finally:
                    link.close()
        except (TimeoutError, LinkError) as error:
            _LOGGER.warning("router %s did not give up a stream: %s", address.replica_id, error or "it took too long")
            message = "the router that has the stream does not answer; try again"
            raise overloaded(503, message, code="stream_busy", retry_after_s=1) from error
        match answer:
            case StreamState():
                return StreamRecord.unpacked(answer)
            case NoStream(_, moved_to, over, why):
                return Gone(moved_to, why) if moved_to or over else None
            case _:
                message = "the router that has the stream answered with something else; try again"
                raise overloaded(503, message, code="stream_busy", retry_after_s=1)

    def _asked(self, link: Link, message: AnyMessage) -> None:
        if not isinstance(message, ClaimStream):
            link.fail(f"a router may not send {type(message).__name__} to another")
            return
        task = asyncio.get_running_loop().create_task(self._answer(link, message))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def _answer(self, link: Link, claim: ClaimStream) -> None:
        try:
            found = await self._shelf.take(claim.token, claim.tenant)
        except StreamBusyError:
            link.fail("the stream is still being written")
            return
        match found:
            case StreamRecord() if found.num_bytes <= _MOST_BYTES:
                self._shelf.moved(claim.token, claim.router_key)
                link.send(found.packed())
            case StreamRecord():
                link.send(NoStream(claim.token, over=True))
            case Gone(moved_to, why):
                link.send(NoStream(claim.token, moved_to, over=not moved_to, why=why))
            case None:
                link.send(NoStream(claim.token))
