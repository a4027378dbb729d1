"""The serving end: a process that lets peers read the pool through mooncake-transfer-engine, and another after it.

States: OPENING until a process is ready -> OPEN -> SHUT when it died -> OPENING again, and CLOSED from anywhere. The
first opening is the constructor's; all that follows happens in the door's own thread, until `close`. The library
chooses its ports itself, and the system where the pool is mapped, so every process has an address of its own.
"""

from __future__ import annotations

import enum
import logging
import secrets
import time
from collections.abc import Callable

import msgspec

from transfer.io_loop import READ, IoLoop, Timer
from transfer.memory import SharedMemory
from transfer.mooncake.messages import IDENTITY_BYTES, DoorAddress, Ready, Refused
from transfer.mooncake.process import EngineProcess
from transfer.transport import TransferTimings

logger = logging.getLogger(__name__)

_START_S = 60.0
_MAX_RETRY_S = 60.0
"""Strangers can end the process as often as they like; this is how often it is started again."""


class _State(enum.Enum):
    OPENING = enum.auto()
    OPEN = enum.auto()
    SHUT = enum.auto()
    CLOSED = enum.auto()


_LEGAL = {
    _State.OPENING: {_State.OPEN, _State.SHUT, _State.CLOSED},
    _State.OPEN: {_State.SHUT, _State.CLOSED},
    _State.SHUT: {_State.OPENING, _State.CLOSED},
    _State.CLOSED: set[_State](),
}


class MooncakeDoor:
    """Implements `door.Door`: opened by the constructor, which waits until the library runs; closed before `memory`.

    `host` is the IPv4 address or name that peers reach this machine by. `ib_device` names the RDMA devices to use, with
    commas between them; empty means TCP. A process that dies is replaced after `timings.retry_s`, one that dies before
    it has been open for a minute after twice the time of the one before it, a minute at most. `on_moved` is called in
    the door's thread whenever `address` is another one. Raises `MooncakeUnavailable` where the library or the device is
    missing, and `ValueError` for an IPv6 host.
    """

    name = "mooncake"

    def __init__(
        self,
        *,
        memory: SharedMemory,
        host: str,
        ib_device: str = "",
        on_moved: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        timings: TransferTimings | None = None,
    ) -> None:
        if ":" in host:
            raise ValueError(f"host {host!r} is an IPv6 address; transport mooncake needs an IPv4 address or a name")
        self._memory = memory
        self._host = host
        self._ib_device = ib_device
        self._on_moved = on_moved
        self._clock = clock
        self._timings = timings or TransferTimings()
        self._retry_s = self._timings.retry_s
        self._timer: Timer | None = None
        self._state = _State.OPENING
        self._begin()
        try:
            self._opened(self._process.wait_ready(timeout_s=_START_S))
        except Exception:
            self._end(timeout_s=_START_S)
            raise
        self._loop = IoLoop(name="mooncake-door", clock=clock)
        self._loop.call_soon(self._watch)

    @property
    def pid(self) -> int:
        """Of the process that serves, or did last."""
        return self._process.pid

    def address(self) -> str:
        return msgspec.json.encode(self._address).decode()

    def close(self, *, timeout_s: float) -> None:
        if self._state is _State.CLOSED:
            return
        self._loop.close(timeout_s=timeout_s)  # from here on all is this thread's
        if self._state is not _State.SHUT:
            self._end(timeout_s=timeout_s)
        self._move_to(_State.CLOSED)
        self._on_moved = lambda: None

    # ---- in the constructor's thread, then in the door's ---------------------------------------------------

    def _begin(self) -> None:
        self._identity = secrets.token_hex(IDENTITY_BYTES)
        self._process = EngineProcess(
            memory_fd=self._memory.fd,
            memory_bytes=self._memory.nbytes,
            host=self._host,
            ib_device=self._ib_device,
            serves=True,
            identity=self._identity,
        )

    def _opened(self, ready: Ready) -> None:
        self._move_to(_State.OPEN)
        self._opened_at = self._clock()
        self._address = DoorAddress(
            protocol="rdma" if self._ib_device else "tcp",
            session=ready.session,
            base=ready.base,
            identity_at=ready.identity_at,
            identity=self._identity,
        )

    def _end(self, *, timeout_s: float) -> None:
        self._process.sock.close()
        self._process.kill(timeout_s=timeout_s)

    def _move_to(self, state: _State) -> None:
        assert state in _LEGAL[self._state], f"a mooncake door cannot go from {self._state} to {state}"
        self._state = state

    # ---- in the door's thread -----------------------------------------------------------------------------

    def _watch(self) -> None:
        self._loop.watch(self._process.sock, READ, self._readable)

    def _open_again(self) -> None:
        self._move_to(_State.OPENING)
        try:
            self._begin()
        except OSError as error:
            self._shut(f"no process can be started: {error}")
            return
        self._watch()
        self._set_timer(_START_S, lambda: self._lose(f"not ready after {_START_S:g} s"))

    def _readable(self) -> None:
        try:
            answer = self._process.receive()
        except EOFError:
            self._lose(f"its process ended: {self._process.ending()}")
            return
        if isinstance(answer, Ready):
            self._cancel_timer()
            self._opened(answer)
            logger.info("the mooncake door is open again, at %s", self._address.session)
            self._on_moved()
        elif isinstance(answer, Refused):
            self._lose(answer.error)

    def _lose(self, why: str) -> None:
        self._loop.forget(self._process.sock)
        try:
            self._end(timeout_s=self._timings.close_s)
        except TimeoutError as error:  # it can only read, so it does no harm
            why = f"{why}; {error}"
        self._shut(why)

    def _shut(self, why: str) -> None:
        if self._state is _State.OPEN and self._clock() - self._opened_at >= _MAX_RETRY_S:
            self._retry_s = self._timings.retry_s
        self._move_to(_State.SHUT)
        pause_s, self._retry_s = self._retry_s, min(2 * self._retry_s, _MAX_RETRY_S)
        self._set_timer(pause_s, self._open_again)
        logger.warning("the mooncake door is shut (%s); peers take our TCP; next attempt in %g s", why, pause_s)

    def _set_timer(self, seconds: float, callback: Callable[[], None]) -> None:
        self._cancel_timer()
        self._timer = self._loop.call_at(self._clock() + seconds, callback)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
