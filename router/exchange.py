"""One HTTP request and its response, over the ASGI interface.

Reads a bounded body in bounded time, notices at once when the client goes away, and bounds the time that one write to a
client may take.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
from starlette.types import Message, Receive, Scope, Send

from router.body_space import BodySpace
from router.errors import ApiError

JSON = b"application/json"
EVENT_STREAM = b"text/event-stream; charset=utf-8"


class ClientGoneError(Exception):
    """The client has closed its connection, or does not read what it is sent."""


class Exchange:
    """`status` is what went out, None until then. Belongs to the task that first writes; `close` it at the end."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, send_timeout_s: float, bodies: BodySpace) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._send_timeout_s = send_timeout_s
        self._bodies = bodies
        self._body_bytes = 0
        """What the body takes of `bodies`."""
        self._writer: asyncio.Task[object] | None = None
        self._write_began: float | None = None
        """When the write that is under way began."""
        self._cutting = False
        self._watchdog: asyncio.TimerHandle | None = None
        self.status: int | None = None
        self.headers: list[tuple[bytes, bytes]] = []
        """What every answer brings, beside its own."""

    def header(self, name: bytes) -> str | None:
        """The value of a header, by its lower-case name."""
        for found, value in self._scope["headers"]:
            if found == name:
                return bytes(value).decode("latin-1")
        return None

    async def body(self, *, max_bytes: int, timeout_s: float) -> bytes:
        """The request's JSON; raises `ApiError` when it is something else (415), too big (413) or too slow (408), or
        when there is no space for it (429). It has that until `body_is_read`, or the end."""
        self._check_is_json()
        announced = self.header(b"content-length")
        if announced is not None and announced.isdecimal() and int(announced) > max_bytes:
            raise _too_big(int(announced), max_bytes)
        parts: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(timeout_s):
                while more:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    part = message.get("body", b"")
                    size += len(part)
                    if size > max_bytes:
                        raise _too_big(size, max_bytes)
                    self._bodies.take(len(part))
                    self._body_bytes += len(part)
                    parts.append(part)
                    more = message.get("more_body", False)
        except TimeoutError as error:
            raise ApiError(408, f"the request's body did not arrive within {timeout_s:g} s; send it faster") from error
        return b"".join(parts)

    def body_is_read(self) -> None:
        """Whoever wanted the body has taken from it what is needed."""
        self._bodies.give_back(self._body_bytes)
        self._body_bytes = 0

    async def watch(self, on_gone: Callable[[], None]) -> None:
        """Call `on_gone` when the client closes its connection. Run as a task, once the body has been read."""
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                on_gone()
                return

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Send the status line and headers."""
        self.status = status
        self._writer = asyncio.current_task()
        self._watch_writes()
        await self._bounded({"type": "http.response.start", "status": status, "headers": [*headers, *self.headers]})

    async def write(self, data: bytes, *, more: bool) -> None:
        """Send a part of the body; raises `ClientGoneError` when it takes too long or `cut` is called meanwhile."""
        await self._bounded({"type": "http.response.body", "body": data, "more_body": more})

    async def answer(self, status: int, data: bytes, *, headers: list[tuple[bytes, bytes]] | None = None) -> None:
        """Send a whole JSON response."""
        fixed = [(b"content-type", JSON), (b"content-length", str(len(data)).encode())]
        await self.start(status, fixed + (headers or []))
        await self.write(data, more=False)

    async def answer_json(self, status: int, value: object) -> None:
        await self.answer(status, msgspec.json.encode(value))

    async def refuse(self, error: ApiError) -> None:
        """Send an error as the whole response."""
        await self.answer(error.status, error.body(), headers=error.headers())

    def cut(self) -> None:
        """Give up a write that is blocked now, if there is one."""
        if self._write_began is not None and self._writer is not None and not self._cutting:
            self._cutting = True
            self._writer.cancel()

    def close(self) -> None:
        """No more is read or written."""
        self.body_is_read()
        if self._watchdog is not None:
            self._watchdog.cancel()

    def _check_is_json(self) -> None:
        """Of what the headers say; a body that nothing is said of may be JSON."""
        kind = self.header(b"content-type")
        if kind is not None:
            name = kind.partition(";")[0].strip().lower()
            if name != "application/json" and not (name.startswith("application/") and name.endswith("+json")):
                message = f"the request's Content-Type is {kind[:100]!r}; send JSON as application/json"
                raise ApiError(415, message, param="Content-Type", code="unsupported_media_type")
        coding = self.header(b"content-encoding")
        if coding is not None and coding.strip().lower() != "identity":
            message = f"the request's Content-Encoding is {coding[:100]!r}; send it as it is"
            raise ApiError(415, message, param="Content-Encoding", code="unsupported_content_encoding")

    def _watch_writes(self) -> None:
        """Cut a write that takes too long. One timer for all writes: most take no time, and a timer each would."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        began = now if self._write_began is None else self._write_began
        if now - began >= self._send_timeout_s:
            self.cut()
        else:
            self._watchdog = loop.call_at(began + self._send_timeout_s, self._watch_writes)

    async def _bounded(self, message: Message) -> None:
        self._write_began = asyncio.get_running_loop().time()
        try:
            await self._send(message)
        except asyncio.CancelledError:
            if self._cutting and self._writer is not None and self._writer.uncancel() == 0:
                raise ClientGoneError from None
            raise
        except OSError as error:
            raise ClientGoneError from error
        finally:
            self._write_began = None


async def send_error(send: Send, error: ApiError) -> None:
    """An error as the whole response, where there is no `Exchange` yet."""
    body = error.body()
    headers = [(b"content-type", JSON), (b"content-length", str(len(body)).encode()), *error.headers()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _too_big(size: int, limit: int) -> ApiError:
    message = f"the request's body has {size} bytes or more, over the limit of {limit}; send less"
    return ApiError(413, message, code="body_too_large")
