"""Somebody between the two ends of a link: frames that are changed, added or repeated end it, and are not heard."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest
from test_link import ROUTER, SECRET, Recorder, join, make_server

from protocol.codec import FrameReader, ProtocolError, encode_frame
from protocol.endpoints import LinkServer
from protocol.handshake import Challenge, Hello, LinkRole, RegionTicket, link_keys, welcome_tag
from protocol.link import Link
from protocol.rooms import Abort, AbortReason, Closed, PeerAddress, Room
from protocol.sealing import FrameSeal

FORGED = Abort(Room("somebody else's", 1), AbortReason.CLIENT_GONE)


@dataclass
class Relay:
    """Passes bytes on, and what the connector says as `meddle` has it."""

    target: PeerAddress
    meddle: Callable[[bytes], bytes] = lambda data: data
    pumps: list["asyncio.Task[None]"] = field(default_factory=list)
    server: asyncio.Server | None = None

    async def start(self) -> PeerAddress:
        self.server = await asyncio.start_server(self._accepted, "127.0.0.1")
        target = self.target
        return PeerAddress(target.replica_id, target.boot, "127.0.0.1", self.server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        assert self.server is not None
        self.server.close()
        for pump in self.pumps:
            pump.cancel()
        await asyncio.gather(*self.pumps, return_exceptions=True)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, forth = await asyncio.open_connection(self.target.host, self.target.port)
        self.pumps.append(asyncio.create_task(self._pump(reader, forth, lambda data: self.meddle(data))))
        self.pumps.append(asyncio.create_task(self._pump(back, writer, lambda data: data)))

    @staticmethod
    async def _pump(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, change: Callable[[bytes], bytes]
    ) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(change(data))
        finally:
            writer.close()


@pytest.fixture
async def relayed() -> AsyncIterator[tuple[LinkServer, Recorder, Relay, Link]]:
    at_server = Recorder()
    server = make_server(at_server)
    relay = Relay(await server.start(host="127.0.0.1"))
    link = await join(await relay.start(), Recorder())
    await at_server.up.get()
    yield server, at_server, relay, link
    link.close()
    await relay.close()
    server.close()


async def test_what_is_only_passed_on_is_heard(relayed: tuple[LinkServer, Recorder, Relay, Link]) -> None:
    _, at_server, _, link = relayed
    for epoch in range(50):
        link.send(Closed(Room("r", epoch)))
    assert [await at_server.next_message() for _ in range(50)] == [Closed(Room("r", epoch)) for epoch in range(50)]


@pytest.mark.parametrize(
    "meddle",
    [
        lambda data: encode_frame(FORGED) + data,
        lambda data: encode_frame(FORGED, FrameSeal(bytes(32))) + data,
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    ],
    ids=["added", "added with a tag of another key", "changed"],
)
async def test_frames_of_somebody_else_end_the_link_unheard(
    relayed: tuple[LinkServer, Recorder, Relay, Link], meddle: Callable[[bytes], bytes]
) -> None:
    _, at_server, relay, link = relayed
    relay.meddle = meddle
    link.send(Closed(Room("r", 1)))
    assert "wrong tag" in await at_server.why_lost()
    assert at_server.messages.empty()


async def test_repeated_frames_are_heard_once(relayed: tuple[LinkServer, Recorder, Relay, Link]) -> None:
    _, at_server, relay, link = relayed
    relay.meddle = lambda data: data + data
    link.send(FORGED)
    assert "wrong tag" in await at_server.why_lost()
    heard = [at_server.messages.get_nowait()[1] for _ in range(at_server.messages.qsize())]
    assert heard in ([FORGED], [])  # none where a ping went before it


def test_frames_are_taken_in_the_order_in_which_they_were_sealed() -> None:
    ours, reader = FrameSeal(b"key"), FrameReader()
    one, other = (encode_frame(Closed(Room("r", epoch)), ours) for epoch in (1, 2))
    reader.trust(FrameSeal(b"key"), max_frame_bytes=1 << 20)
    with pytest.raises(ProtocolError, match="wrong tag"):
        list(reader.feed(other + one))


def test_each_direction_of_each_link_has_a_key_of_its_own() -> None:
    def keys(server_nonce: bytes, nonce: bytes) -> tuple[bytes, bytes]:
        hello = Hello(1, LinkRole.ROUTER, "r", 1, nonce, b"")
        return link_keys(SECRET, Challenge(1, server_nonce), hello)

    assert len({*keys(b"a", b"b"), *keys(b"a", b"c"), *keys(b"c", b"b")}) == 6
    assert keys(b"a", b"b") == keys(b"a", b"b")


def test_a_welcome_is_proof_of_what_it_says() -> None:
    challenge = Challenge(1, b"a")
    hello = Hello(1, ROUTER.role, ROUTER.peer_id, ROUTER.boot, b"b", b"")
    region = RegionTicket(1, 4096, "layout", "host", "", "127.0.0.1", 1)
    here, there = PeerAddress("decode-0", 1, "127.0.0.1", 1), PeerAddress("decode-0", 1, "127.0.0.2", 1)
    said = [(here, None), (there, None), (here, region)]
    assert len({welcome_tag(SECRET, challenge, hello, *each) for each in said}) == 3
