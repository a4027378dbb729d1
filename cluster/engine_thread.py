"""The engine thread of a replica: the only thread that touches requests, pages and the device.

Lifecycle: `start` runs a loop of drain the inbox, let the halves act, step the engine, hand everything to be sent to
the event loop in one call. Others leave events in the inbox or ask for a function to be run there (`call`). While the
engine steps nobody touches a request; offers alone are taken then (`cluster/inbox.py`). `stop` ends the loop after the
event in hand.

When there is nothing to do the thread sleeps until an event comes, the halves' next deadline, or the next idle report.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import msgspec

from cluster.engine_events import Call, Event
from cluster.event_handler import EventHandler
from cluster.grammar_gate import GrammarGate
from cluster.inbox import Inbox
from cluster.landing_wait import LandingWait
from cluster.outbox import Outbox, Outgoing
from cluster.worker_state import StateReporter
from decode.half import DecodeHalf
from engine.engine import Engine
from engine.outputs import StepOutput
from prefill.half import PrefillHalf
from prefill.table import PrefillState
from protocol.rooms import Load

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class EngineThread:
    """Runs one engine and the two halves over it.

    `deliver` is called on `loop` with the messages of each pass. An error that is nobody's request ends the thread and
    is kept in `crash` for the health check; `on_crash` is called on `loop`, so that peers need not wait for that check.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        outbox: Outbox,
        prefill: PrefillHalf,
        decode: DecodeHalf,
        gate: GrammarGate,
        inbox: Inbox,
        loop: asyncio.AbstractEventLoop,
        deliver: Callable[[Outgoing], None],
        on_crash: Callable[[], None],
        reporter: StateReporter,
        idle_report_s: float = 0.5,
    ) -> None:
        self._engine = engine
        self._outbox = outbox
        self._prefill = prefill
        self._decode = decode
        self._gate = gate
        self._inbox = inbox
        self._loop = loop
        self._deliver = deliver
        self._on_crash = on_crash
        self._reporter = reporter
        self._idle_report_s = idle_report_s
        self._events = EventHandler(engine=engine, outbox=outbox, prefill=prefill, decode=decode, gate=gate)
        self._draining = False
        self._stopping = threading.Event()
        self._beat = time.monotonic()
        self._reported_at = 0.0
        self._landing_wait = LandingWait()
        self.crash: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the loop and wait for it; a step in progress is finished first."""
        self._stopping.set()
        self._inbox.post(Call(lambda: None))
        self._thread.join(timeout_s)

    @property
    def seconds_since_beat(self) -> float:
        """How long the current pass has been running (or sleeping): grows without bound only when it hangs."""
        return time.monotonic() - self._beat

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def drain(self) -> Future[None]:
        """Take no new rooms; those that are open finish, and routers hear of it with the next frame."""

        def begin() -> None:
            self._draining = True
            self._prefill.drain()
            self._decode.drain()

        return self.call(begin)

    def call(self, function: Callable[[], _T]) -> Future[_T]:
        """Run `function` on the engine thread between two steps; the future has its result."""
        future: Future[_T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)

        self._inbox.post(Call(run))
        return future

    # ---- on the engine thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._pass()
        except BaseException as error:
            log.exception("the engine thread died")
            self.crash = error.with_traceback(None)  # or it would hold this thread, and with it all of the engine
            self._loop.call_soon_threadsafe(self._on_crash)

    def _pass(self) -> None:
        self._beat = time.monotonic()
        for event in self._wait_for_events():
            self._events.handle(event)
        self._tick()
        if self._engine.has_work():
            self._await_landings()
            began = time.monotonic()
            with self._inbox.aside(self._decode.hasten):
                output: StepOutput = self._engine.step()
            self._landing_wait.stepped(time.monotonic() - began)
            self._decode.after_step(output)
            self._prefill.after_step(output)
        self._flush()

    def _tick(self) -> None:
        self._prefill.tick()
        self._decode.tick()
        self._gate.tick()
        # Before the step, not after it: a peer waits for what was just answered, and a step can take long.
        self._flush()

    def _await_landings(self) -> None:
        """Let prompts into this step that land in a moment."""
        landing = self._decode.landing()
        if not landing:
            return
        until = time.monotonic() + self._landing_wait.seconds(landing, running=self._engine.load().running_requests)
        heard = False
        while (left := until - time.monotonic()) > 0 and landing & self._decode.landing():
            event = self._sleep(left)
            if event is None:
                break
            self._events.handle(event)
            heard = True
        if heard:
            self._tick()

    def _wait_for_events(self) -> list[Event]:
        events: list[Event] = []
        if not self._engine.has_work():
            event = self._sleep(self._patience())
            if event is None:
                return events
            events.append(event)
        events.extend(self._inbox.rest())
        return events

    def _sleep(self, timeout_s: float) -> Event | None:
        with self._inbox.aside(self._decode.hasten):
            return self._inbox.wait(timeout_s)

    def _patience(self) -> float:
        """Seconds to sleep when there is no work."""
        now = time.monotonic()
        wake_at = now + self._idle_report_s
        for deadline in (self._prefill.next_deadline(), self._decode.next_deadline(), self._gate.next_deadline()):
            if deadline is not None:
                wake_at = min(wake_at, deadline)
        return max(0.0, wake_at - now)

    def _flush(self) -> None:
        now = time.monotonic()
        report_to: frozenset[str] = frozenset()
        if now - self._reported_at >= self._idle_report_s:
            self._reported_at = now
            self._reporter.publish(self._load(), self._engine, self._prefill, self._decode)
            report_to = frozenset(self._events.routers)
        outgoing = self._outbox.take(self._load, report_to=report_to)
        if outgoing:
            self._loop.call_soon_threadsafe(self._deliver, outgoing)

    def _load(self) -> Load:
        """The engine's load, and the rooms that are not let into it yet."""
        load = self._engine.load()
        outside = 0
        if self._prefill.num_waiting:
            rooms = self._prefill.rooms.values()
            outside = sum(record.request.num_tokens for record in rooms if record.state is PrefillState.WAITING)
        return msgspec.structs.replace(
            load,
            waiting_requests=load.waiting_requests + self._prefill.num_waiting + self._decode.num_waiting,
            waiting_tokens=load.waiting_tokens + outside,
            draining=self._draining,
        )
