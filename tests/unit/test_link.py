"""Links over real loopback sockets: authentication, order, loss, hostile and silent peers."""

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.codec import AnyMessage, ProtocolError, decode_body, encode_frame
from protocol.control import RegionMoved
from protocol.endpoints import Identity, LinkServer, connect
from protocol.handshake import Challenge, Hello, LinkRole, Ping, RegionTicket
from protocol.link import Link, LinkError, LinkTimings
from protocol.rooms import (
    Abort,
    AbortReason,
    Closed,
    Load,
    Message,
    Offer,
    PeerAddress,
    Room,
    StepFrame,
    TokenEvent,
)

SECRET = b"the cluster secret"
QUICK = LinkTimings(handshake_s=5, ping_s=0.02, silence_s=0.2)
ROUTER = Identity(role=LinkRole.ROUTER, peer_id="router-1", boot=7)
SAID = [
    Hello(1, LinkRole.ROUTER, "router-1", 7, b"nonce", b"tag"),
    Offer(Room("r", 1), 0, [1, 2, 3], [1, 2, 2**64 - 1]),
    StepFrame([TokenEvent("r", 1, 0, 1, 2)], Load(0, 0, 0, 1, 2, 3)),
]


@dataclass
class Recorder:
    """Collects what a link reports and lets a test wait for it."""

    messages: "asyncio.Queue[tuple[Link, AnyMessage]]" = field(default_factory=asyncio.Queue)
    lost: "asyncio.Queue[str]" = field(default_factory=asyncio.Queue)
    up: "asyncio.Queue[Link]" = field(default_factory=asyncio.Queue)

    async def next_message(self) -> AnyMessage:
        async with asyncio.timeout(10):
            return (await self.messages.get())[1]

    async def why_lost(self) -> str:
        async with asyncio.timeout(10):
            return await self.lost.get()


def make_server(recorder: Recorder, *, boot: int = 1, timings: LinkTimings = QUICK) -> LinkServer:
    return LinkServer(
        secret=SECRET,
        replica_id="decode-0",
        boot=boot,
        region=None,
        on_up=recorder.up.put_nowait,
        on_message=lambda link, message: recorder.messages.put_nowait((link, message)),
        on_lost=lambda link, why: recorder.lost.put_nowait(why),
        timings=timings,
    )


@pytest.fixture
async def served() -> AsyncIterator[tuple[LinkServer, Recorder]]:
    recorder = Recorder()
    server = make_server(recorder)
    await server.start(host="127.0.0.1")
    yield server, recorder
    server.close()


async def join(
    address: PeerAddress, recorder: Recorder, *, secret: bytes = SECRET, identity: Identity = ROUTER
) -> Link:
    return await connect(
        address,
        secret=secret,
        identity=identity,
        on_message=lambda link, message: recorder.messages.put_nowait((link, message)),
        on_lost=lambda link, why: recorder.lost.put_nowait(why),
        timings=QUICK,
    )


async def test_messages_arrive_in_order_both_ways(served: tuple[LinkServer, Recorder]) -> None:
    server, at_server = served
    at_client = Recorder()
    link = await join(server.address, at_client)
    assert (link.peer_id, link.boot, link.role) == ("decode-0", 1, LinkRole.REPLICA)
    accepted = await at_server.up.get()
    assert (accepted.peer_id, accepted.boot, accepted.role) == ("router-1", 7, LinkRole.ROUTER)
    sent = [Abort(Room("r", epoch), AbortReason.CLIENT_GONE) for epoch in range(500)]
    for message in sent:
        link.send(message)
        accepted.send(Closed(message.room))
    assert [await at_server.next_message() for _ in sent] == sent
    assert [await at_client.next_message() for _ in sent] == [Closed(message.room) for message in sent]
    link.close()
    why = await at_server.why_lost()
    assert why == "closed by the peer" or "Connection reset" in why, why  # reset, where a ping came that nobody reads


async def test_idle_link_stays_up_by_pings(served: tuple[LinkServer, Recorder]) -> None:
    server, at_server = served
    at_client = Recorder()
    link = await join(server.address, at_client)
    await at_server.up.get()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(3 * QUICK.silence_s):
            await at_client.lost.get()
    assert link.is_open


async def test_wrong_secret_and_wrong_boot_are_refused(served: tuple[LinkServer, Recorder]) -> None:
    server, at_server = served
    with pytest.raises(LinkError):
        await join(server.address, Recorder(), secret=b"another secret")
    older = PeerAddress("decode-0", 99, server.address.host, server.address.port)
    with pytest.raises(LinkError, match="boot 99"):
        await join(older, Recorder())
    assert at_server.messages.empty()


async def test_replicas_hear_where_a_region_has_moved_to(served: tuple[LinkServer, Recorder]) -> None:
    server, at_server = served
    region = RegionTicket(1, 4096, "layout", "host", "", "127.0.0.1", 1)
    replica, router = Recorder(), Recorder()
    link = await join(server.address, replica, identity=Identity(role=LinkRole.REPLICA, peer_id="decode-1", boot=3))
    await join(server.address, router)
    for _ in ("replica", "router"):
        await at_server.up.get()
    assert link.region is None
    server.move_region(region)
    for accepted in server.links:
        accepted.send(Closed(Room("last", 1)))
    assert await replica.next_message() == RegionMoved(region)
    assert await router.next_message() == Closed(Room("last", 1))
    later = await join(server.address, Recorder())
    assert later.region == region


async def test_unreachable_peer_is_a_link_error() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = PeerAddress("gone", 1, "127.0.0.1", unused.getsockname()[1])
        with pytest.raises(LinkError, match="gone"):
            await join(address, Recorder())


@pytest.mark.parametrize("host", ["", "no\0name", "\ud800", "x" * 70 + ".name"])
async def test_a_host_that_cannot_exist_is_a_link_error(host: str) -> None:
    with pytest.raises(LinkError, match="nowhere"):
        await join(PeerAddress("nowhere", 1, host, 1), Recorder())


async def test_a_port_that_cannot_exist_is_a_link_error() -> None:
    with pytest.raises(LinkError, match="nowhere"):
        await join(PeerAddress("nowhere", 1, "127.0.0.1", 1 << 16), Recorder())


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack(">I", 1 << 31),
        struct.pack(">I", 3) + b"abc",
        encode_frame(SAID[0]).replace(b"router-1", b"\xff" * 8),  # no UTF-8
        encode_frame(Ping(1)),
        encode_frame(Challenge(1, b"n")),
        encode_frame(Abort(Room("r", 1), AbortReason.DEADLINE)),
        struct.pack(">I", 16017) + b"\x94\xa7welcome\x95\xa1a\x00\xa1b\x00" + 16000 * b"\x91" + b"\x90",  # too deep
    ],
)
async def test_unauthenticated_bytes_change_nothing(
    served: tuple[LinkServer, Recorder], garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    server, at_server = served
    reader, writer = await asyncio.open_connection(server.address.host, server.address.port)
    writer.write(garbage)
    async with asyncio.timeout(10):
        await reader.read()  # the challenge, then the end
    writer.close()
    link = await join(server.address, Recorder())
    link.send(Closed(Room("after", 1)))
    assert await at_server.next_message() == Closed(Room("after", 1))
    assert caplog.records == []  # or anybody could fill the logs


@given(st.sampled_from(SAID), st.lists(st.tuples(st.integers(0, 200), st.binary(max_size=3), st.integers(0, 3))))
def test_whatever_is_no_message_is_refused_as_such(said: Message, cuts: list[tuple[int, bytes, int]]) -> None:
    body = encode_frame(said)[4:]
    for at, put, left_out in cuts:
        body = body[:at] + put + body[at + left_out :]
    with contextlib.suppress(ProtocolError):
        decode_body(body)


async def test_silent_peer_is_lost(served: tuple[LinkServer, Recorder]) -> None:
    server, at_server = served
    link = await join(server.address, Recorder())
    await at_server.up.get()
    assert link._timer is not None
    link._timer.cancel()  # this end stops pinging ...
    assert link._transport is not None
    link._transport.pause_reading()  # ... and stops answering pings
    assert "silent" in await at_server.why_lost()


async def test_a_pause_of_both_ends_is_the_silence_of_none(
    served: tuple[LinkServer, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, at_server = served
    at_client = Recorder()
    link = await join(served[0].address, at_client)
    accepted = await at_server.up.get()
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "time", lambda: time.monotonic() + 3600)  # as after a machine's pause of an hour
    for epoch in range(3):  # all timers have come up by the end of the first
        link.send(Closed(Room("r", epoch)))
        assert await at_server.next_message() == Closed(Room("r", epoch))
        accepted.send(Closed(Room("r", epoch)))
        assert await at_client.next_message() == Closed(Room("r", epoch))
    assert link.is_open
    assert accepted.is_open


async def test_a_closed_link_does_not_wait_for_a_peer_that_reads_nothing(served: tuple[LinkServer, Recorder]) -> None:
    server, at_server = served
    link = await join(server.address, Recorder())
    accepted = await at_server.up.get()
    assert link._transport is not None
    assert accepted._transport is not None
    assert link._timer is not None
    link._timer.cancel()  # this end minds no silence
    link._transport.pause_reading()
    for _ in range(200):
        accepted.send(Abort(Room("r" * 65536, 1), AbortReason.DEADLINE))
    assert accepted._transport.get_write_buffer_size() > 0
    sock = accepted._transport.get_extra_info("socket")
    ended = asyncio.Event()
    monitored = accepted.connection_lost

    def connection_lost(exc: Exception | None) -> None:
        monitored(exc)
        ended.set()

    accepted.connection_lost = connection_lost  # type: ignore[method-assign]
    accepted.close()
    assert await at_server.why_lost() == "closed here"
    async with asyncio.timeout(10):
        await ended.wait()
    assert sock.fileno() == -1
    link.close()


async def test_peer_that_never_reads_is_cut_off(served: tuple[LinkServer, Recorder]) -> None:
    server, at_server = served
    link = await join(server.address, Recorder())
    accepted = await at_server.up.get()
    accepted._max_buffered_bytes = 1 << 20
    assert link._transport is not None
    link._transport.pause_reading()
    message = Abort(Room("r" * 65536, 1), AbortReason.DEADLINE)
    for _ in range(1000):
        accepted.send(message)
    assert "unread" in await at_server.why_lost()


async def test_handshake_deadline() -> None:
    recorder = Recorder()
    server = make_server(recorder, timings=LinkTimings(handshake_s=0.05))
    await server.start(host="127.0.0.1")
    reader, writer = await asyncio.open_connection(server.address.host, server.address.port)
    async with asyncio.timeout(10):
        await reader.read()
    writer.close()
    assert recorder.up.empty()
    server.close()


def test_a_checksum_below_nothing_is_no_message() -> None:
    body = encode_frame(Offer(Room("r", 1), 0, [1], [5]))[4:]
    assert body.count(b"\x91\x05") == 1
    with pytest.raises(ProtocolError):
        decode_body(body.replace(b"\x91\x05", b"\x91\xff"))  # -1
