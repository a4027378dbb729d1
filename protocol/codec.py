"""Bytes to messages and back: msgpack bodies behind a four-byte big-endian length and, once a link is authenticated, a
tag (`sealing.py`).

No sockets. A body that is not one of the known messages raises `ProtocolError`, and so does
a length above `MAX_FRAME_BYTES`, so that a malformed peer costs bounded memory.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import msgspec

from protocol.control import CacheFlushed, EndRequests, FlushCache, RegionMoved
from protocol.handshake import Challenge, Hello, Ping, Pong, Welcome
from protocol.rooms import DecodeToPrefill, Message, PrefillToDecode, ReplicaToRouter, RouterToReplica
from protocol.sealing import TAG_BYTES, FrameSeal
from protocol.streams import ClaimStream, NoStream, StreamState

MAX_FRAME_BYTES = 64 << 20

AnyMessage = (
    RouterToReplica
    | ReplicaToRouter
    | DecodeToPrefill
    | PrefillToDecode
    | EndRequests
    | FlushCache
    | CacheFlushed
    | RegionMoved
    | ClaimStream
    | StreamState
    | NoStream
    | Hello
    | Challenge
    | Welcome
    | Ping
    | Pong
)

_LENGTH = struct.Struct(">I")
_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


class ProtocolError(ValueError):
    """The peer sent something that is not a message of this protocol version."""


def encode_frame(message: Message, seal: FrameSeal | None = None) -> bytes:
    """The length-prefixed frame of one message."""
    body = _ENCODER.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a frame of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + (b"" if seal is None else seal.tag(body)) + body


def decode_body(body: bytes | memoryview) -> AnyMessage:
    """The message in one frame's body; raises `ProtocolError` for anything else."""
    try:
        return _DECODER.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:  # the last: nested too deep
        raise ProtocolError(f"not a message of this protocol: {error}") from error


class FrameReader:
    """Splits a byte stream into messages: feed what arrived, iterate over what is complete."""

    def __init__(self, *, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._buffer = bytearray()
        self._max_frame_bytes = max_frame_bytes
        self._seal: FrameSeal | None = None

    def feed(self, data: bytes) -> Iterator[AnyMessage]:
        """The messages completed by `data`, in order, each decoded when asked for.

        Raises `ProtocolError` at a malformed one, after which the stream is of no more use.
        """
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= _LENGTH.size:
                seal = self._seal
                (length,) = _LENGTH.unpack_from(buffer, start)
                if length > self._max_frame_bytes:
                    raise ProtocolError(f"a frame of {length} bytes is over the limit of {self._max_frame_bytes}")
                at = start + _LENGTH.size + (0 if seal is None else TAG_BYTES)
                if len(buffer) < at + length:
                    break
                tag, body = bytes(buffer[start + _LENGTH.size : at]), bytes(buffer[at : at + length])
                if seal is not None and not seal.is_next(tag, body):
                    raise ProtocolError("a frame has a wrong tag: it is not the next one that the peer sent")
                start = at + length
                yield decode_body(body)
        finally:
            del buffer[:start]

    def trust(self, seal: FrameSeal, *, max_frame_bytes: int) -> None:
        """The peer has proved who it is: allow larger frames, and from the next one on only those that it sealed."""
        self._seal = seal
        self._max_frame_bytes = max_frame_bytes
