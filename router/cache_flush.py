"""Asking every replica to drop its cached prefixes, and hearing what became of it.

A round asks all replicas that are up and takes their answers; one that is lost meanwhile has given none, for its link
may have broken and nothing else. Rounds are repeated while any is busy and time is left.
"""

from __future__ import annotations

import asyncio
import itertools

from protocol.control import CacheFlushed, FlushCache
from router.membership import MemberTable
from router.replica_view import ReplicaView

_ANSWER_S = 10.0
"""The engine answers between two steps."""
_PAUSE_S = 0.05


class CacheFlush:
    """Of one router, on its event loop."""

    def __init__(self, members: MemberTable) -> None:
        self._members = members
        self._numbers = itertools.count(1)
        self._waiting: dict[tuple[int, str], asyncio.Future[CacheFlushed | None]] = {}

    async def run(self, *, timeout_s: float) -> dict[str, CacheFlushed | None]:
        """The last answer of each replica, by its id; None from one that gave none. Busy ones are asked again until
        `timeout_s` are over."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        answers: dict[str, CacheFlushed | None] = {}
        while True:
            views = [view for view in self._members.views if view.is_up]
            views = [view for view in views if (last := answers.get(view.address.replica_id)) is None or last.rooms]
            found = await asyncio.gather(*(self._ask(view) for view in views))
            answers |= {view.address.replica_id: answer for view, answer in zip(views, found, strict=True)}
            left_s = deadline - loop.time()
            if left_s <= 0 or not any(answer is not None and answer.rooms for answer in found):
                return answers
            await asyncio.sleep(min(_PAUSE_S, left_s))

    def answered(self, view: ReplicaView, message: CacheFlushed) -> None:
        """A replica has answered."""
        if not message.rooms:
            view.prefixes.clear()
        waiter = self._waiting.get((message.number, view.address.replica_id))
        if waiter is not None and not waiter.done():
            waiter.set_result(message)

    def lost(self, view: ReplicaView) -> None:
        """The link to a replica broke."""
        for (_, replica_id), waiter in self._waiting.items():
            if replica_id == view.address.replica_id and not waiter.done():
                waiter.set_result(None)

    async def _ask(self, view: ReplicaView) -> CacheFlushed | None:
        number = next(self._numbers)
        key = (number, view.address.replica_id)
        waiter: asyncio.Future[CacheFlushed | None] = asyncio.get_running_loop().create_future()
        self._waiting[key] = waiter
        try:
            view.send(FlushCache(number))
            async with asyncio.timeout(_ANSWER_S):
                return await waiter
        except TimeoutError:
            return None
        finally:
            del self._waiting[key]
