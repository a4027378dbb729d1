"""One answer of a page server on its way: the reply, then the bytes that it promises. Runs on the server's `IoLoop`."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

from transfer.grain_cursor import GrainChanged
from transfer.io_loop import WRITE, IoLoop
from transfer.served import Outgoing
from transfer.stall_watch import StallWatch

logger = logging.getLogger(__name__)

_TURN_BYTES = 4 << 20
"""Then the other connections have their turn."""


class AnswerSender:
    """`payload` is None when nothing follows the reply. Ends with exactly one of `on_sent` and `on_failed`, unless it
    is stopped: a receiver that takes nothing for `stall_s` seconds is a failure too. The socket is its owner's, who
    watches it again afterwards."""

    def __init__(
        self,
        loop: IoLoop,
        sock: socket.socket,
        *,
        reply: bytes,
        payload: Outgoing | None,
        clock: Callable[[], float],
        stall_s: float,
        on_sent: Callable[[], None],
        on_failed: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._reply = reply
        self._payload = payload
        self._on_sent = on_sent
        self._on_failed = on_failed
        self._watch = StallWatch(
            loop,
            clock=clock,
            seconds=stall_s,
            on_stall=lambda: self._fail(f"the receiver took no byte for {stall_s} s"),
        )

    def start(self) -> None:
        """Begin; may already end here."""
        self._writable()

    def stop(self) -> None:
        """Send no more, and let go of the memory."""
        self._watch.cancel()
        if self._payload is not None:
            self._payload.drop()

    @property
    def _left(self) -> int:
        return len(self._reply) + (0 if self._payload is None else self._payload.left)

    def _writable(self) -> None:
        try:
            budget = _TURN_BYTES
            while budget > 0 and self._left:
                budget -= self._send_some()
                self._watch.moved()
        except (BlockingIOError, InterruptedError):
            pass  # the rest when there is room again
        except (OSError, GrainChanged) as error:
            self._fail(f"sending pages: {error}")
            return
        except Exception as error:  # a bug, which would come again as long as the socket takes bytes
            logger.exception("sending pages failed")
            self._fail(f"sending pages: {error!r}")
            return
        if self._left:
            self._loop.watch(self._sock, WRITE, self._writable)
            return
        self.stop()
        self._on_sent()

    def _send_some(self) -> int:
        if not self._reply:
            assert self._payload is not None
            return self._payload.send(self._sock)
        more = 0 if self._payload is None else socket.MSG_MORE
        sent = self._sock.send(self._reply, socket.MSG_NOSIGNAL | more)
        self._reply = self._reply[sent:]
        return sent

    def _fail(self, why: str) -> None:
        self.stop()
        self._on_failed(why)
