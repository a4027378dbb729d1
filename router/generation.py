"""One sequence from its first room to its last token, over as many epochs as it takes.

Lifecycle (`GenerationState`): NEW -> WAITING -> OPEN, at once when a replica is up -> FINISHED with the last token
logged. When an epoch fails it goes OPEN -> WAITING -> OPEN, mostly within one call, resuming after what is logged,
until `max_epochs` in a row have brought no token (FAILED). ABORTED when the client is gone or the deadline has passed.
The rules are the router's table in docs/protocol.md. A generation owns its token log and its half-rooms; its stream
belongs to the HTTP request.

Synchronous throughout: links and timers call in, nothing here waits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from protocol.rooms import RETRYABLE, AbortReason, FailureCode, Job, Phases, PromptScores, Room, RoomFailed, TokenEvent
from protocol.sampling import FinishReason
from router.config import RouterConfig
from router.errors import ApiError, deadline_passed, overloaded, room_failed
from router.failover import Failover
from router.generation_state import GenerationState
from router.half_rooms import HalfRooms
from router.metrics import RouterMetrics
from router.pairing import Route
from router.prefix_index import BLOCK_TOKENS, prefix_chain
from router.replica_view import ReplicaView
from router.route_search import CallLater, Choose, RouteSearch
from router.score_log import ScoreLog
from router.timeline import SequenceTimeline
from router.token_log import ContradictionError, TokenLog
from router.token_stream import TokenStream

_PAUSE_S = 0.025
"""Before a replica that failed this sequence is tried again; doubled for each failure since the last token."""


@dataclass(frozen=True, kw_only=True)
class GenerationServices:
    """What a generation needs of the router around it; times are seconds of `clock`."""

    config: RouterConfig
    metrics: RouterMetrics
    choose: Choose
    clock: Callable[[], float]
    call_later: CallLater
    on_end: Callable[[Generation], None]


@dataclass(frozen=True, kw_only=True)
class Begun:
    """What earlier generations of the same sequence have logged; they are over."""

    tokens: list[int]
    epoch: int
    """The last one."""


class Generation:
    """Drives the rooms of one sequence and feeds its tokens, in order and once, to `stream`."""

    def __init__(
        self,
        *,
        request_id: str,
        job: Job,
        index: int,
        received_at: float,
        deadline: float,
        stream: TokenStream,
        services: GenerationServices,
        timeline: SequenceTimeline | None = None,
        begun: Begun | None = None,
        scores: ScoreLog | None = None,
    ) -> None:
        """`index` is the sequence's place in its HTTP request, which came at `received_at`. A job that asks for a
        timeline, or for scores of its prompt, brings them to be filled in."""
        self.request_id = request_id
        self.index = index
        self.epoch = -1
        self.state = GenerationState.NEW
        self.log = TokenLog()
        if begun is not None:
            self.epoch = begun.epoch
            self.log.tokens += begun.tokens
        self._job = job
        self._received_at = received_at
        self._deadline = deadline
        self._stream = stream
        self._services = services
        self._timeline = timeline
        self._scores = scores
        if timeline is not None:
            timeline.received(received_at)
        self._chain = prefix_chain(job.prompt, namespace=job.namespace)
        # What is scored is computed, whatever is cached.
        scored_from = len(job.prompt) if job.scoring is None else job.scoring.start - 1
        self._reused = self._chain[: scored_from // BLOCK_TOKENS]
        self._halves = HalfRooms(chain=self._chain, reused=self._reused, metrics=services.metrics)
        self._failover = Failover()
        self._routes = RouteSearch(
            choose=services.choose,
            failover=self._failover,
            clock=services.clock,
            call_later=services.call_later,
            wait_s=services.config.failover_wait_s,
        )
        self._in_vain = 0
        """Failed epochs since the last token was logged, without those that ended because a replica drains."""
        self._last_token_at = 0.0

    @property
    def replicas(self) -> list[ReplicaView]:
        """Where a half of this epoch may still be open."""
        return self._halves.views

    def start(self) -> None:
        """Open the first epoch; where no replica is up, as when all have just started, wait for one within bounds."""
        if not self.log.tokens:
            self._services.metrics.prompt_tokens.add(len(self._job.prompt))
        self._search()

    # ---- what links say -------------------------------------------------------------------------------------

    def on_token(self, event: TokenEvent, now: float) -> None:
        """A token arrived for this request."""
        if event.epoch != self.epoch or self.state is not GenerationState.OPEN:
            self._services.metrics.stale_messages.add()
            return
        try:
            if event.position == 0 and self._scores is not None and not self._scores.is_complete:
                raise ContradictionError("the first token came before the scores of the prompt")
            logged = self.log.offer(event)
        except ContradictionError as error:
            self._contradicted(error)
            return
        for entry in logged:
            self._logged(entry, now)

    def on_scores(self, message: PromptScores) -> None:
        """Scores of the prompt arrived for this request."""
        if message.room.epoch != self.epoch or self.state is not GenerationState.OPEN or self._scores is None:
            self._services.metrics.stale_messages.add()
            return
        try:
            self._scores.offer(message.scores)
        except ContradictionError as error:
            self._contradicted(error)

    def on_phases(self, message: Phases, view: ReplicaView) -> None:
        """A replica says where its time went, in this epoch or one that has failed."""
        if self._timeline is None:
            self._services.metrics.stale_messages.add()
        else:
            self._timeline.heard(message.room.epoch, view.address.replica_id, message.phases)

    def on_failed(self, message: RoomFailed, view: ReplicaView) -> None:
        """A half gave this room up."""
        halves, code = self._halves, message.code
        # A half that is over already (prefill's, once decode has begun) can fail as it likes.
        if message.room.epoch != self.epoch or self.state is not GenerationState.OPEN or view not in halves.views:
            self._services.metrics.stale_messages.add()
            return
        other = halves.decode if view is halves.prefill else halves.prefill
        halves.close(view)
        if code in RETRYABLE:
            tell = self._failover.half_failed(code, view, other)
            self._reopen(code, message.detail, cause=code.value, tell=tell)
        else:
            halves.abort(AbortReason.PEER_FAILED)
            self._fail(self._error(code, message.detail))

    def on_link_lost(self, view: ReplicaView, why: str) -> None:
        """The link to a replica broke; it aborts what this router had there."""
        if self.state is not GenerationState.OPEN or view not in self._halves.views:
            return
        self._halves.close(view)
        self._failover.link_lost(view)
        detail = f"the link to {view.address.replica_id} was lost: {why}"
        self._reopen(FailureCode.PEER_LOST, detail, cause="link_lost", tell=AbortReason.PEER_FAILED)

    def on_replica_up(self) -> None:
        """A replica can be used (again): one that lacks any goes on."""
        self._routes.replica_up()

    # ---- what the request says ------------------------------------------------------------------------------

    def cut_short(self) -> bool:
        """End it here: what there is so far is the answer. Nothing happens, and False, where it has ended already."""
        under_way = self.state in (GenerationState.OPEN, GenerationState.WAITING)
        if under_way:
            self.abort(AbortReason.CLIENT_GONE)
            if self._timeline is not None:
                self._timeline.cut_short()
            end = TokenEvent(
                self.request_id, self.epoch, self._job.choice, len(self.log.tokens), 0, finish=FinishReason.ABORT
            )
            self._stream.put(self.index, end)
        return under_way

    def abort(self, reason: AbortReason) -> None:
        """End it from this side; both halves hear. Does nothing to one that has ended."""
        if self.state in (GenerationState.OPEN, GenerationState.WAITING):
            self._halves.abort(reason)
            self._end(GenerationState.ABORTED)

    def give_up(self, error: ApiError) -> None:
        """End it from the router's side; both halves hear, and the client gets `error`."""
        self.abort(AbortReason.DRAINING)
        self._stream.fail(error)

    # ---- inner workings -------------------------------------------------------------------------------------

    def _logged(self, event: TokenEvent, now: float) -> None:
        if self.state is not GenerationState.OPEN:  # ended by the token before, or by a full stream
            return
        metrics = self._services.metrics
        metrics.output_tokens.add()
        self._in_vain = 0
        if event.position == 0:
            metrics.ttft_s.observe(now - self._received_at)
            metrics.cached_tokens.add(event.cached_tokens or 0)
            self._halves.prompt_computed()
            if self._timeline is not None:
                self._timeline.first_token()
        else:
            if self._last_token_at:  # not the first one after a pause that the client made
                metrics.itl_s.observe(now - self._last_token_at)
            if self._halves.prefill is not None:
                # Decode admits only what it holds whole: with its first token, prefill's part is over.
                self._halves.close(self._halves.prefill)
        self._last_token_at = now
        if event.finish is not None:
            if self._timeline is not None:
                self._timeline.finished()
            self._end(GenerationState.FINISHED)
        self._stream.put(self.index, event)

    def _contradicted(self, error: ContradictionError) -> None:
        self._services.metrics.contradictions.add()
        self._reopen(FailureCode.INTERNAL, str(error), cause="contradiction", tell=AbortReason.SUPERSEDED)

    def _search(self) -> None:
        """Open the next epoch when a replica can take it."""
        job = self._job
        self._move(GenerationState.WAITING)
        request = self._failover.request(
            prompt_tokens=len(job.prompt),
            logged=len(self.log.tokens),
            chain=self._reused,
            single_token=job.sampling.max_tokens == 1,
        )
        self._routes.begin(
            request,
            deadline=self._deadline,
            pause_s=_PAUSE_S * 2**self._in_vain,
            found=self._open,
            gave_up=self._no_route,
        )

    def _open(self, route: Route) -> None:
        self._move(GenerationState.OPEN)
        self.epoch += 1
        if self._timeline is not None:
            prefill, decode = (
                None if view is None else view.address.replica_id for view in (route.prefill, route.decode)
            )
            self._timeline.opened(prefill=prefill, decode=decode)
        job = self._job
        if self.epoch > 0:
            scoring = None if self._scores is None else self._scores.rest
            job = msgspec.structs.replace(job, logged=list(self.log.tokens), scoring=scoring)
        ttl_ms = max(1, int(1000 * (self._deadline - self._services.clock())))
        self._halves.open(Room(self.request_id, self.epoch), route, job, ttl_ms=ttl_ms)

    def _reopen(self, code: FailureCode, detail: str, *, cause: str, tell: AbortReason) -> None:
        """This epoch is over: begin the next one."""
        self._halves.abort(tell)
        self.log.forget_early()
        if code is not FailureCode.DRAINING:  # that replica gets nothing more, and nothing is wrong with the request
            self._in_vain += 1
        if self._in_vain >= self._services.config.max_epochs:
            self._fail(self._error(code, detail))
            return
        self._services.metrics.failovers.add(label=cause)
        if self._timeline is not None:
            self._timeline.failed(cause, detail)
        self._search()

    def _no_route(self) -> None:
        """Neither the deadline nor the router's patience lets this epoch be opened."""
        if self._services.clock() >= self._deadline:
            self._fail(deadline_passed(self._deadline - self._received_at))
            return
        config = self._services.config
        wait = f"{config.failover_wait_s:g} s; try again"
        if self.epoch < 0:
            message = f"no replica is up to serve the request, and none came up within {wait}"
        else:
            message = f"every replica went away, and none came back within {wait}"
        self._fail(overloaded(503, message, code="no_replica", retry_after_s=config.retry_after_s))

    def _error(self, code: FailureCode, detail: str) -> ApiError:
        retry_after_s = self._services.config.retry_after_s
        return room_failed(
            code,
            detail,
            epochs=self.epoch + 1,
            retry_after_s=retry_after_s,
            grammar=self._job.sampling.grammar,
        )

    def _fail(self, error: ApiError) -> None:
        self._end(GenerationState.FAILED)
        self._stream.fail(error)

    def _end(self, state: GenerationState) -> None:
        self._halves.close_all()
        self._routes.end()
        self._move(state)
        self._services.metrics.sequences.add(label=state.value)
        self._services.on_end(self)

    def _move(self, state: GenerationState) -> None:
        assert self.state.may_become(state), f"a generation cannot go from {self.state} to {state}"
        self.state = state
