"""What others leave for a replica's engine thread: events, which it takes in order between two steps.

Offers need not wait for that. All they do is to begin copies, into pages that no step touches; and a step that ends
before a copy of the last pages has begun costs its request another one. So while the engine thread steps or sleeps it
stands *aside*, and who brings an offer then hands it over itself.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator

from cluster.engine_events import Event, Received
from protocol.rooms import Offer

OfferTaker = Callable[[str, Offer], bool]
"""Takes an offer that came over a link, or says that it must wait for its turn."""


class Inbox:
    """Anyone may `post`; all else is the engine thread's."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._halves = threading.Lock()  # held by whoever may touch them: the engine thread, unless it stands aside
        self._halves.acquire()
        self._take_offer: OfferTaker | None = None

    def post(self, event: Event) -> None:
        """Leave an event; never blocks."""
        if not (isinstance(event, Received) and isinstance(event.message, Offer) and self._took(event, event.message)):
            self._events.put(event)

    def _took(self, event: Received, offer: Offer) -> bool:
        if not self._halves.acquire(blocking=False):
            return False  # the engine thread is between two steps, and takes it with the rest
        try:
            return self._take_offer is not None and self._take_offer(event.link_id, offer)
        finally:
            self._halves.release()

    @contextlib.contextmanager
    def aside(self, take_offer: OfferTaker) -> Iterator[None]:
        """For a block that does not touch the halves: offers that come meanwhile go to `take_offer`, in their own
        thread, one at a time and none after the block."""
        self._take_offer = take_offer
        self._halves.release()
        try:
            yield
        finally:
            self._halves.acquire()
            self._take_offer = None

    def wait(self, timeout_s: float) -> Event | None:
        """The next event, or None when there is none in time."""
        try:
            return self._events.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def rest(self) -> Iterator[Event]:
        """The events that are there, without waiting."""
        while True:
            try:
                yield self._events.get_nowait()
            except queue.Empty:
                return
