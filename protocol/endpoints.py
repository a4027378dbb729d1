"""The two ends a link can have: a server that accepts links, and `connect`, which makes one.

The listener challenges, the connector proves the cluster secret and says who it is, the listener proves it too and
says who *it* is. Neither acts on anything before the other has proved itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from protocol.codec import AnyMessage
from protocol.control import RegionMoved
from protocol.handshake import (
    Challenge,
    Hello,
    LinkRole,
    RegionTicket,
    Welcome,
    hello_tag,
    link_keys,
    new_nonce,
    tags_equal,
    welcome_tag,
)
from protocol.link import Link, LinkError, LinkTimings, LostHandler, MessageHandler, UpHandler
from protocol.rooms import PROTOCOL_VERSION, PeerAddress
from protocol.sealing import FrameSeal, LinkSeals

_MAX_PENDING_HANDSHAKES = 256


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Who a connector says it is. `boot` differs in every life of the process."""

    role: LinkRole
    peer_id: str
    boot: int


class LinkServer:
    """Accepts links on a TCP port; `address` is known once `start` returns."""

    def __init__(
        self,
        *,
        secret: bytes,
        replica_id: str,
        boot: int,
        region: RegionTicket | None,
        on_up: UpHandler,
        on_message: MessageHandler,
        on_lost: LostHandler,
        timings: LinkTimings | None = None,
    ) -> None:
        self._secret = secret
        self._replica_id = replica_id
        self._boot = boot
        self._region = region
        self._on_up = on_up
        self._on_message = on_message
        self._on_lost = on_lost
        self._timings = timings or LinkTimings()
        self._links: set[Link] = set()
        self._pending: dict[Link, None] = {}
        """Links in their handshake, oldest first."""
        self._server: asyncio.Server | None = None
        self.address = PeerAddress(replica_id, boot, "", 0)

    async def start(self, *, host: str, port: int = 0, advertise_host: str | None = None) -> PeerAddress:
        """Listen on `host`; peers are told to come to `advertise_host`. Raises OSError if the port is taken."""
        server = await asyncio.get_running_loop().create_server(self._new_link, host, port)
        self._server = server
        bound_port = server.sockets[0].getsockname()[1]
        self.address = PeerAddress(self._replica_id, self._boot, advertise_host or host, bound_port)
        return self.address

    @property
    def links(self) -> frozenset[Link]:
        """The authenticated links that live now."""
        return frozenset(self._links)

    def move_region(self, region: RegionTicket) -> None:
        """Tell this to every replica that has a link, and to those that will."""
        self._region = region
        for link in list(self._links):  # one that is too full ends while it is written to
            if link.role is LinkRole.REPLICA:
                link.send(RegionMoved(region))

    def close(self) -> None:
        """Stop listening and end every link."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for link in [*self._links, *self._pending]:
            link.close()

    def _new_link(self) -> Link:
        link = Link(
            handshake=_Listener(self._secret, self.address, lambda: self._region),
            on_up=self._up,
            on_message=self._on_message,
            on_lost=self._lost,
            timings=self._timings,
        )
        if len(self._pending) >= _MAX_PENDING_HANDSHAKES:
            next(iter(self._pending)).fail("too many unauthenticated connections")
        self._pending[link] = None
        return link

    def _up(self, link: Link) -> None:
        self._pending.pop(link, None)
        self._links.add(link)
        self._on_up(link)

    def _lost(self, link: Link, why: str) -> None:
        self._pending.pop(link, None)
        if link in self._links:
            self._links.remove(link)
            self._on_lost(link, why)


async def connect(
    address: PeerAddress,
    *,
    secret: bytes,
    identity: Identity,
    on_message: MessageHandler,
    on_lost: LostHandler,
    timings: LinkTimings | None = None,
) -> Link:
    """An established link to the replica at `address`, in the life (`boot`) the address names.

    `on_lost` is called only for a link that was returned. Raises `LinkError` when the replica cannot be reached in
    time, does not know the secret, speaks another version or was restarted since.
    """
    timings = timings or LinkTimings()
    at = f"{address.replica_id} at {address.host}:{address.port}"
    outcome: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
    """Why there will be no link, None where there is one. Neither the link nor an error: both know of this."""

    def up(link: Link) -> None:
        if not outcome.done():
            outcome.set_result(None)

    def lost(link: Link, why: str) -> None:
        if not outcome.done():
            outcome.set_result(why)
        elif not outcome.cancelled() and outcome.result() is None:
            on_lost(link, why)

    link = Link(
        handshake=_Connector(secret, address, identity),
        on_up=up,
        on_message=on_message,
        on_lost=lost,
        timings=timings,
    )
    try:
        async with asyncio.timeout(timings.handshake_s):
            await asyncio.get_running_loop().create_connection(lambda: link, address.host, address.port)
            why = await outcome
    except TimeoutError as error:
        link.fail("handshake timed out")
        raise LinkError(f"{at} did not answer in {timings.handshake_s} s") from error
    except asyncio.CancelledError:
        link.fail("connecting was cancelled")
        raise
    except (OSError, OverflowError, ValueError) as error:  # also ports and host names that cannot exist
        # asyncio's frame keeps the error: without its traceback that is no cycle with all that is behind `on_lost`.
        raise LinkError(f"{at}: {error}") from error.with_traceback(None)
    if why is not None:
        raise LinkError(f"{at}: {why}")
    return link


class _Listener:
    """Challenge, check the Hello, answer Welcome."""

    def __init__(self, secret: bytes, address: PeerAddress, region: Callable[[], RegionTicket | None]) -> None:
        self._secret = secret
        self._address = address
        self._region = region
        self._challenge = Challenge(PROTOCOL_VERSION, new_nonce())

    def start(self, link: Link) -> None:
        link.send(self._challenge)

    def receive(self, link: Link, message: AnyMessage) -> LinkSeals:
        if not isinstance(message, Hello):
            raise LinkError("the first message was not a Hello")
        if message.version != PROTOCOL_VERSION:
            raise LinkError(f"the peer speaks protocol version {message.version}, this side {PROTOCOL_VERSION}")
        expected = hello_tag(self._secret, self._challenge, message.role, message.peer_id, message.boot, message.nonce)
        if not tags_equal(expected, message.tag):
            raise LinkError("the peer does not know the cluster secret")
        link.role, link.peer_id, link.boot = message.role, message.peer_id, message.boot
        region = self._region()
        tag = welcome_tag(self._secret, self._challenge, message, self._address, region)
        link.send(Welcome(self._address, region, tag))
        theirs, ours = link_keys(self._secret, self._challenge, message)
        return LinkSeals(outgoing=FrameSeal(ours), incoming=FrameSeal(theirs))


class _Connector:
    """Answer the Challenge, check the Welcome."""

    def __init__(self, secret: bytes, address: PeerAddress, identity: Identity) -> None:
        self._secret = secret
        self._address = address
        self._identity = identity
        self._challenge: Challenge | None = None
        self._hello: Hello | None = None

    def start(self, link: Link) -> None:
        """The listener speaks first."""

    def receive(self, link: Link, message: AnyMessage) -> LinkSeals | None:
        if isinstance(message, Challenge) and self._challenge is None:
            self._answer(link, message)
            return None
        if isinstance(message, Welcome) and self._challenge is not None and self._hello is not None:
            tag = welcome_tag(self._secret, self._challenge, self._hello, message.address, message.region)
            self._check(link, message, tag)
            ours, theirs = link_keys(self._secret, self._challenge, self._hello)
            return LinkSeals(outgoing=FrameSeal(ours), incoming=FrameSeal(theirs))
        raise LinkError(f"{type(message).__name__} came out of turn in the handshake")

    def _answer(self, link: Link, challenge: Challenge) -> None:
        if challenge.version != PROTOCOL_VERSION:
            raise LinkError(f"the peer speaks protocol version {challenge.version}, this side {PROTOCOL_VERSION}")
        me, nonce = self._identity, new_nonce()
        tag = hello_tag(self._secret, challenge, me.role, me.peer_id, me.boot, nonce)
        self._challenge = challenge
        self._hello = Hello(PROTOCOL_VERSION, me.role, me.peer_id, me.boot, nonce, tag)
        link.send(self._hello)

    def _check(self, link: Link, welcome: Welcome, expected_tag: bytes) -> None:
        if not tags_equal(expected_tag, welcome.tag):
            raise LinkError("the peer does not know the cluster secret")
        found = (welcome.address.replica_id, welcome.address.boot)
        if found != (self._address.replica_id, self._address.boot):
            raise LinkError(f"expected {self._address.replica_id} in boot {self._address.boot}, found {found}")
        link.role, link.peer_id, link.boot = LinkRole.REPLICA, welcome.address.replica_id, welcome.address.boot
        link.region = welcome.region
