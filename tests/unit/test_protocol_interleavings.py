"""The room protocol under every bounded interleaving, and under random ones.

Two real replicas (halves and engine over a toy model whose tokens prove that all KV was right), a router model, and a
schedule that decides the order of everything: messages on different links, copies, engine steps, lost links, repeated
messages, wrong bytes, clients that leave, time that passes, replicas that die and come back. The invariants are in
`tests/unit/rooms/` (`Replica.check`, `World.check_settled`, `World.run_out`). The last tests break one law each and
show that these schedules find it.

What runs here takes half a minute. Two deviations in every scenario (150,116 schedules, 438,000 states) take a quarter
of an hour and were run by hand when the tables were last changed; nothing broke.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from decode.half import DecodeMessage
from decode.intake import PageIntake
from decode.table import DECODE_TABLE, DecodeAction, DecodeEvent, DecodeState
from prefill.table import PREFILL_TABLE, PrefillAction, PrefillEvent, PrefillState
from protocol.room_memory import Fate, RoomMemory
from protocol.rooms import Room
from protocol.scoring import Scoring
from protocol.transitions import Move
from tests.unit.rooms.copies import Key
from tests.unit.rooms.explore import explore, walk
from tests.unit.rooms.replica import LawBroken, Replica
from tests.unit.rooms.router import Asked
from tests.unit.rooms.world import START, World
from transfer.jobs import FetchResult

LONG, OTHER = Asked((1, 2, 3, 4, 5)), Asked((7, 8, 9, 1, 2))
EARLY = Asked((7, 8, 9), stops_early=True)
SCENARIOS: dict[str, tuple[Sequence[Asked], tuple[int, int]]] = {
    "one room": ([LONG], (8, 8)),
    "one that ends at its first token": ([EARLY], (8, 8)),
    "a long and an early one": ([LONG, EARLY], (8, 8)),
    "two rooms in a pool for one": ([LONG, OTHER], (4, 4)),
    "three with a common prefix": ([LONG, Asked((1, 2, 3, 4, 5, 6)), Asked((1, 2, 3, 4), stops_early=True)], (6, 6)),
    "one with scores after its like": ([LONG, Asked(LONG.prompt, scoring=Scoring(2))], (6, 6)),
    "one that comes while another decodes": ([Asked((7, 8), max_tokens=8), Asked((1, 2, 3, 4, 5, 6, 7))], (12, 12)),
    "a cycle of full pools": ([Asked((1, 2, 3, 4, 5, 6, 7)), OTHER], (6, 5)),
}
"""What clients ask for, and the pages of the two pools.

In the last one decode reserves for the first room, which is too large to be computed ahead; prefill computes the second
ahead, and then has no space for the first. Only a reservation that is taken back lets either go on.
"""


def maker(
    scenario: str, break_law: Callable[[Replica], None] | None = None, *, unreliable: bool = False
) -> Callable[[], World]:
    asked, pages = SCENARIOS[scenario]
    return lambda: World(asked, pages=pages, break_law=break_law, unreliable=unreliable)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """The engine reports every batch that the schedules make fail."""
    caplog.set_level(logging.CRITICAL, logger="engine.engine")


# ---- the protocol as it is ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_schedule_with_one_deviation(scenario: str) -> None:
    explored = explore(maker(scenario), deviations=1)
    assert explored.schedules > 80


def test_every_schedule_of_an_early_end_with_two_deviations() -> None:
    explored = explore(maker("one that ends at its first token"), deviations=2)
    assert explored.states > 1000


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_any_order_without_faults_finishes_every_request(scenario: str) -> None:
    revocations = hastened = 0
    for seed in range(60):
        world = walk(maker(scenario), seed=seed, faults=0, fault_rate=0.0)
        assert [client.result for client in world.router.clients.values()] == ["finished"] * len(SCENARIOS[scenario][0])
        assert world.router.failures == [], seed
        here = world.replicas["D"].decode.counters.revocations
        assert world.now == START + 3.0 * here, f"only a decode lease may take time, in the walk of seed {seed}"
        revocations += here
        hastened += world.hastened
    assert hastened or scenario != "one that comes while another decodes"
    assert (revocations > 0) == (scenario == "a cycle of full pools")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_random_schedules_with_faults(scenario: str) -> None:
    results: Counter[str] = Counter()
    for seed in range(200):
        try:
            world = walk(maker(scenario), seed=seed, faults=1 + seed % 5, fault_rate=0.1, wait_rate=0.1 * (seed % 3))
        except Exception as error:
            raise LawBroken(f"{error} in the walk of seed {seed}") from error
        results.update(client.result for client in world.router.clients.values())
    assert results["finished"] > 40
    assert results["gone"] > 10


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_random_schedules_where_messages_get_lost_and_overtake_each_other(scenario: str) -> None:
    """More than a link does: offers, reservations, handoffs, confirmations and aborts, each alone."""
    results: Counter[str] = Counter()
    for seed in range(100):
        try:
            make = maker(scenario, unreliable=True)
            world = walk(make, seed=seed, faults=1 + seed % 5, fault_rate=0.2, wait_rate=0.1 * (seed % 3))
        except Exception as error:
            raise LawBroken(f"{error} in the walk of seed {seed}") from error
        results.update(client.result for client in world.router.clients.values())
    assert results["finished"] > 50
    assert results["deadline"] > 0, "no message was lost that anybody needed"


# ---- the protocol with one law broken -----------------------------------------------------------------------------


def pages_without_quarantine(replica: Replica) -> None:
    give_up = Move(
        (DecodeAction.BURY, DecodeAction.RELEASE, DecodeAction.FORGET, DecodeAction.CLOSED), DecodeState.ENDED
    )
    replica.decode._table = DECODE_TABLE.replaced(DecodeState.RECEIVING, DecodeEvent.ABORT, give_up)


def epochs_ignored(replica: Replica) -> None:
    class Forgetful(RoomMemory):
        def fate(self, room: Room) -> Fate:
            fate = super().fate(room)
            return Fate.UNKNOWN if fate is Fate.STALE else fate

        def live_older_than(self, room: Room) -> Room | None:
            return None

    replica.prefill._memory.__class__ = Forgetful
    replica.decode._memory.__class__ = Forgetful


def no_abort_to_the_other_half(replica: Replica) -> None:
    last = PREFILL_TABLE.move(PrefillState.COMPUTING, PrefillEvent.LAST_TOKEN)
    silent = Move(tuple(action for action in last.actions if action is not PrefillAction.TELL_DECODE), last.state)
    replica.prefill._table = PREFILL_TABLE.replaced(PrefillState.COMPUTING, PrefillEvent.LAST_TOKEN, silent)


def no_tombstones(replica: Replica) -> None:
    for memory in (replica.prefill._memory, replica.decode._memory):
        memory.tombstones.bury = lambda room, **kwargs: None  # type: ignore[method-assign]


def checksums_not_verified(replica: Replica) -> None:
    finish = replica.copies.finish

    def trusting(key: Key) -> FetchResult:
        copied = replica.copies.running[key].copied
        return dataclasses.replace(finish(key), ok=copied)

    replica.copies.finish = trusting  # type: ignore[method-assign]


def admitted_before_all_pages_are_here(replica: Replica) -> None:
    class Hasty(PageIntake):
        @property
        def is_complete(self) -> bool:
            return self._num_here > 0

    decode = replica.decode
    handle = decode.handle

    def handle_hastily(link: str, message: DecodeMessage) -> None:
        handle(link, message)
        for record in decode.rooms.values():
            record.intake.__class__ = Hasty

    decode.handle = handle_hastily  # type: ignore[method-assign]


def computed_ahead_without_limit(replica: Replica) -> None:
    replica.prefill._ahead._max_pages = 1000


def an_early_abort_bars_one_half_only(replica: Replica) -> None:
    replica._halves_of = lambda wire, room: [Replica._halves_of(replica, wire, room)[0]]  # type: ignore[method-assign]


def test_an_open_that_an_abort_has_overtaken_is_found() -> None:
    def try_all() -> None:
        make = maker("one room", an_early_abort_bars_one_half_only, unreliable=True)
        for seed in range(120):
            walk(make, seed=seed, faults=1 + seed % 5, fault_rate=0.2, wait_rate=0.1 * (seed % 3))

    with pytest.raises(LawBroken, match="lives although it sent"):
        try_all()


@pytest.mark.parametrize(
    ("break_law", "scenario", "complaint"),
    [
        (pages_without_quarantine, "one room", "are not its room's"),
        (epochs_ignored, "a long and an early one", "live at once"),
        (no_abort_to_the_other_half, "one that ends at its first token", "which is over"),
        (no_tombstones, "a long and an early one", "which is over"),
        (checksums_not_verified, "one room", "but the answer is"),
        (admitted_before_all_pages_are_here, "one room", "but the answer is"),
        (computed_ahead_without_limit, "a long and an early one", "that decode has not reserved"),
    ],
)
def test_a_broken_law_is_found(break_law: Callable[[Replica], None], scenario: str, complaint: str) -> None:
    def try_all() -> None:
        make = maker(scenario, break_law)
        explore(make, deviations=1)
        for seed in range(300):
            walk(make, seed=seed, faults=1 + seed % 5, fault_rate=0.1)

    with pytest.raises(LawBroken, match=complaint):
        try_all()
