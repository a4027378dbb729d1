"""What may happen in the middle of a step, and what waits for its end."""

from __future__ import annotations

import threading

import pytest

from cluster.engine_events import Event, LinkLost, Received
from cluster.inbox import Inbox
from protocol.rooms import Abort, AbortReason, Offer, Room

ROOM = Room("a", 0)
OFFER = Received("prefill#1", Offer(ROOM, 0, [1], [1]))
OTHERS: list[Event] = [Received("prefill#1", Abort(ROOM, AbortReason.CLIENT_GONE)), LinkLost("prefill#1")]
_WAIT_S = 10.0


class Taker:
    """Takes offers, or does not."""

    def __init__(self, *, willing: bool = True) -> None:
        self.taken: list[tuple[str, Offer]] = []
        self._willing = willing

    def __call__(self, link: str, offer: Offer) -> bool:
        if self._willing:
            self.taken.append((link, offer))
        return self._willing


def test_an_offer_is_taken_while_the_owner_stands_aside() -> None:
    inbox, taker = Inbox(), Taker()
    with inbox.aside(taker):
        inbox.post(OFFER)
    assert taker.taken == [(OFFER.link_id, OFFER.message)]
    assert list(inbox.rest()) == []


@pytest.mark.parametrize("event", OTHERS)
def test_all_else_waits(event: Event) -> None:
    inbox, taker = Inbox(), Taker()
    with inbox.aside(taker):
        inbox.post(event)
    assert taker.taken == []
    assert list(inbox.rest()) == [event]


def test_an_offer_waits_that_is_not_taken() -> None:
    inbox = Inbox()
    with inbox.aside(Taker(willing=False)):
        inbox.post(OFFER)
    assert inbox.wait(0.0) == OFFER


def test_an_offer_waits_while_the_owner_does_not_stand_aside() -> None:
    inbox, taker = Inbox(), Taker()
    inbox.post(OFFER)
    with inbox.aside(taker):
        pass
    inbox.post(OFFER)
    assert taker.taken == []
    assert list(inbox.rest()) == [OFFER, OFFER]


def test_the_owner_comes_back_only_when_an_offer_has_been_taken() -> None:
    inbox = Inbox()
    begun, go_on = threading.Event(), threading.Event()
    order: list[str] = []

    def slowly(link: str, offer: Offer) -> bool:
        begun.set()
        assert go_on.wait(_WAIT_S)
        order.append("taken")
        return True

    def step() -> None:
        with inbox.aside(slowly):
            assert begun.wait(_WAIT_S)
            leaving.set()
        order.append("back")

    leaving = threading.Event()
    owner = threading.Thread(target=step)
    poster = threading.Thread(target=inbox.post, args=(OFFER,))
    both = [owner, poster]
    for thread in both:
        thread.start()
    assert leaving.wait(_WAIT_S)
    inbox.post(OFFER)  # a second one does not wait for the first: it goes with the rest
    go_on.set()
    for thread in both:
        thread.join(_WAIT_S)
    assert order == ["taken", "back"]
    assert list(inbox.rest()) == [OFFER]


def test_a_taker_that_fails_leaves_the_inbox_as_it_was() -> None:
    inbox = Inbox()

    def fail(link: str, offer: Offer) -> bool:
        raise RuntimeError("no")

    with inbox.aside(fail):
        with pytest.raises(RuntimeError, match="no"):
            inbox.post(OFFER)
        inbox.post(OTHERS[0])
    assert list(inbox.rest()) == [OTHERS[0]]


def test_a_wait_without_an_event_ends() -> None:
    assert Inbox().wait(0.0) is None
