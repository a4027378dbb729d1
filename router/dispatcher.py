"""The meeting point of generations and replicas: every frame from a link goes to the generation it is about.

One per router, on its event loop. It lists the generations under way, hands them their tokens and failures, tells them
of links that break or come up, and asks pairing on their behalf.
"""

from __future__ import annotations

import asyncio
import secrets

from protocol.codec import AnyMessage
from protocol.control import CacheFlushed, EndRequests
from protocol.endpoints import Identity
from protocol.rooms import Closed, Job, Phases, PromptScores, RoomFailed, StepFrame
from router.cache_flush import CacheFlush
from router.config import RouterConfig
from router.errors import overloaded
from router.generation import Begun, Generation, GenerationServices
from router.generation_state import GenerationState
from router.membership import MemberTable
from router.metrics import RouterMetrics
from router.open_requests import OpenRequests
from router.pairing import PairingPolicy, Route, RouteRequest
from router.replica_view import ReplicaView
from router.score_log import ScoreLog
from router.start_window import StartWindow
from router.timeline import SequenceTimeline
from router.token_stream import TokenStream


class Dispatcher:
    """Implements `ReplicaEvents`; owns the member table."""

    def __init__(
        self, *, config: RouterConfig, identity: Identity, policy: PairingPolicy, metrics: RouterMetrics
    ) -> None:
        self.members = MemberTable(events=self, secret=config.secret, identity=identity, timings=config.link_timings)
        self.generations: dict[str, Generation] = {}
        self.requests = OpenRequests()
        self.flush = CacheFlush(self.members)
        self._config = config
        self._policy = policy
        self._start = StartWindow(length_s=config.failover_wait_s)
        self._metrics = metrics
        metrics.add_gauge("router_open_sequences", "sequences under way", lambda: len(self.generations))
        metrics.add_gauge("router_waiting_sequences", "sequences without a first token", self._without_token)
        metrics.add_gauge("router_usable_replicas", "replicas that may be given rooms", self._usable)

    def generate(
        self,
        *,
        request_id: str,
        job: Job,
        index: int,
        received_at: float,
        deadline: float,
        stream: TokenStream,
        timeline: SequenceTimeline | None = None,
        begun: Begun | None = None,
        scores: ScoreLog | None = None,
    ) -> Generation:
        """Start one sequence; its `stream` gets all that goes wrong. Times are the running loop's."""
        loop = asyncio.get_running_loop()
        generation = Generation(
            request_id=request_id,
            job=job,
            index=index,
            received_at=received_at,
            deadline=deadline,
            stream=stream,
            services=GenerationServices(
                config=self._config,
                metrics=self._metrics,
                choose=self.choose,
                clock=loop.time,
                call_later=loop.call_later,
                on_end=self._ended,
            ),
            timeline=timeline,
            begun=begun,
            scores=scores,
        )
        self.generations[request_id] = generation
        generation.start()
        return generation

    def choose(self, request: RouteRequest, *, patient: bool) -> Route | None:
        """Pairing's answer for the members as they are now; None while the `patient` had better wait for a pair."""
        route = self._policy.choose(request, self.members.prefills, self.members.decodes)
        now = asyncio.get_running_loop().time()
        if route is not None and patient and not request.whole and self._start.holds_back(route, now):
            return None
        return route

    # ---- ReplicaEvents ----------------------------------------------------------------------------------------

    def replica_up(self, view: ReplicaView) -> None:
        self._start.replica_up(self.members, asyncio.get_running_loop().time())
        for generation in self._waiting():
            generation.on_replica_up()

    def replica_message(self, view: ReplicaView, message: AnyMessage) -> None:
        match message:
            case StepFrame(tokens, load):
                view.observe(load)
                now = asyncio.get_running_loop().time()
                for event in tokens:
                    if (generation := self._addressee(event.request_id)) is not None:
                        generation.on_token(event, now)
            case RoomFailed(room):
                if (generation := self._addressee(room.request_id)) is not None:
                    generation.on_failed(message, view)
            case Phases(room):
                if (generation := self._addressee(room.request_id)) is not None:
                    generation.on_phases(message, view)
            case PromptScores(room):
                if (generation := self._addressee(room.request_id)) is not None:
                    generation.on_scores(message)
            case EndRequests(number, name):
                if self.requests.is_news(number):
                    self.requests.end(name)
            case CacheFlushed():
                self.flush.answered(view, message)
            case Closed():
                self._metrics.closed_rooms.add()
            case _:
                assert view.link is not None
                view.link.fail(f"a replica may not send {type(message).__name__} to a router")

    def end_requests(self, name: str | None) -> int:
        """End what a client calls so, or everything, at every router; returns how many sequences that were here."""
        order = EndRequests(secrets.randbits(63), name)
        self.requests.is_news(order.number)
        for view in self.members.views:
            view.send(order)
        return self.requests.end(name)

    def replica_lost(self, view: ReplicaView, why: str) -> None:
        self.flush.lost(view)
        if view.listed:
            self._metrics.link_losses.add(label=view.address.replica_id)
        for request_id in list(view.rooms):
            generation = self.generations.get(request_id)
            if generation is not None:
                generation.on_link_lost(view, why)

    async def close(self) -> None:
        """Abort what is open and end the links."""
        message = "the router is shutting down; try again"
        error = overloaded(503, message, code="shutting_down", retry_after_s=self._config.retry_after_s)
        for generation in list(self.generations.values()):
            generation.give_up(error)
        await self.members.close()

    # ---- inner workings -----------------------------------------------------------------------------------------

    def _addressee(self, request_id: str) -> Generation | None:
        """Whom a message is for; one that comes too late is counted."""
        generation = self.generations.get(request_id)
        if generation is None:
            self._metrics.stale_messages.add()
        return generation

    def _ended(self, generation: Generation) -> None:
        self.generations.pop(generation.request_id, None)

    def _waiting(self) -> list[Generation]:
        return [each for each in self.generations.values() if each.state is GenerationState.WAITING]

    def _without_token(self) -> int:
        return sum(not each.log.tokens for each in self.generations.values())

    def _usable(self) -> int:
        return sum(view.usable for view in self.members.views)
