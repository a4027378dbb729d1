"""Runs one request's work and writes its response.

Lifecycle: admit, start every sequence, then write what their tokens make until the last has finished. The status goes
out with the first token or the first error. Whatever ends the request early - the client leaves or stops reading, the
deadline passes, a sequence fails for good - aborts every sequence that is still open, and the client, if it is there,
gets the error: as the response, or as the last event of a stream that has begun.

A stream that is come back to is written again from its session's log, as far as that goes; the sequences that had not
finished then go on in new epochs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from protocol.rooms import AbortReason
from router.admission import Admission, Ticket
from router.api.response import ResponseFormat
from router.config import RouterConfig
from router.dispatcher import Dispatcher
from router.errors import ApiError, deadline_passed, internal_error
from router.exchange import EVENT_STREAM, ClientGoneError, Exchange
from router.generation import Begun, Generation
from router.metrics import RouterMetrics
from router.number_space import HeldNumbers
from router.streams.event_id import Place
from router.streams.session import StreamSession
from router.token_stream import Ready, TokenStream
from router.work import Delta, SequenceOutput, Work, pushed

_STREAM_HEADERS = [(b"content-type", EVENT_STREAM), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]

_DESCRIBED_HERE = 512
"""Tokens of prompts and outputs that the event loop describes itself; more would hold up the streams of others."""

_LOGGER = logging.getLogger(__name__)


class RequestRunner:
    """One request from its parsed work to its last byte; used once."""

    def __init__(
        self,
        exchange: Exchange,
        work: Work,
        outputs: Sequence[SequenceOutput],
        response: ResponseFormat,
        *,
        dispatcher: Dispatcher,
        admission: Admission,
        numbers: HeldNumbers,
        config: RouterConfig,
        metrics: RouterMetrics,
        received_at: float,
        timeout_s: float,
        tenant: str,
        session: StreamSession | None,
    ) -> None:
        """`numbers` is the runner's to close. The request came at `received_at`, by the loop's clock; its deadline is
        `timeout_s` later. `session` is there for a stream that can be come back to."""
        self._exchange = exchange
        self._work = work
        self._outputs = outputs
        self._response = response
        self._dispatcher = dispatcher
        self._admission = admission
        self._numbers = numbers
        self._metrics = metrics
        self._received_at = received_at
        self._timeout_s = timeout_s
        self._tenant = tenant
        self._session = session
        self._unfinished = len(work.jobs)
        self._generations: list[Generation] = []
        self._stream = TokenStream(
            max_buffered=config.max_buffered_tokens * len(work.jobs), on_overflow=self._overflowed
        )

    async def run(self) -> None:
        """Write the response; raises `ApiError` while none has begun, and `ClientGoneError` for nobody to write to."""
        ticket = self._admit()
        watcher = asyncio.create_task(self._exchange.watch(self._client_gone))
        deadline = self._received_at + self._timeout_s
        timer = asyncio.get_running_loop().call_at(deadline, self._deadline_passed)
        number: int | None = None
        try:
            if self._session is not None and self._session.has_begun:
                self._session.begins(self._outputs)
                again = self._write_again(self._session)
                number = self._start(deadline)
                await self._write_stream(again, ticket)
                return
            number = self._start(deadline)
            if self._session is not None and self._session.lost is not None:
                await self._write_stream(await self._make_again(self._session, self._session.lost, ticket), ticket)
                return
            ready = await self._next(ticket)
            if self._work.stream:
                await self._write_stream(self._numbered(self._response.opening()) + self._pieces(ready), ticket)
            else:
                await self._write_whole(ready, ticket)
        except ClientGoneError:
            self._abort(AbortReason.CLIENT_GONE)
            raise
        finally:
            timer.cancel()
            watcher.cancel()
            ticket.close()
            self._numbers.close()
            if number is not None:
                self._dispatcher.requests.leave(number)
            self._abort(AbortReason.PEER_FAILED)  # of those that are open still: another sequence has failed for good
            if self._session is not None:
                self._session.ended(self._generations, self._outputs)

    async def _make_again(self, session: StreamSession, place: Place, ticket: Ticket) -> bytes:
        """What comes after `place` in a stream that is lost, as soon as its tokens are there once more."""
        ready: Ready = []
        while len(ready) < place.through and not (ready and ready[-1][1].finish):
            ready += await self._next(ticket)
        batches = session.split(ready, place)
        data = [self._numbered(self._response.opening())]
        for batch in batches:
            data.append(self._pieces(batch))
            if batch is batches[0]:
                session.restart()
        return b"".join(data)

    def _admit(self) -> Ticket:
        if self._session is not None:
            self._session.on_claim(self._client_gone)
        try:
            return self._admission.admit(
                tenant=self._tenant,
                sequences=len(self._work.jobs),
                prompt_tokens=self._work.prompt_tokens,
                priority=self._work.priority,
            )
        finally:
            self._exchange.headers += self._admission.tenants.headers(self._tenant)

    def _start(self, deadline: float) -> int:
        """Begin what has not ended; returns the number of the request among those under way."""
        rooms = "" if self._session is None else self._session.rooms
        for index, job in enumerate(self._work.jobs):
            output = self._outputs[index]
            if output.finish is not None:
                continue
            self._generations.append(
                self._dispatcher.generate(
                    request_id=f"{self._work.response_id}{rooms}.{index}",
                    job=job,
                    index=index,
                    received_at=self._received_at,
                    deadline=deadline,
                    stream=self._stream,
                    begun=self._begun(index),
                    timeline=self._outputs[index].timeline,
                    scores=self._outputs[index].scores,
                )
            )
        return self._dispatcher.requests.enter(self._work.response_id, self._work.names, self._generations)

    def _begun(self, index: int) -> Begun | None:
        """What earlier runs have of a sequence."""
        if self._session is None or not self._session.has_begun:
            return None
        return Begun(tokens=self._outputs[index].tokens, epoch=self._session.epoch(index))

    def _write_again(self, session: StreamSession) -> bytes:
        """What the client has missed of earlier runs."""
        data = [self._numbered(self._response.opening())]
        data += [self._numbered(self._encoded(batch)) for batch in session.batches()]
        if self._unfinished:
            session.check_seen()
        return b"".join(data)

    async def _write_stream(self, data: bytes, ticket: Ticket) -> None:
        await self._exchange.start(200, _STREAM_HEADERS)
        try:
            while self._unfinished:
                if data:
                    await self._exchange.write(data, more=True)
                data = self._pieces(await self._next(ticket))
        except ClientGoneError:
            raise
        except Exception as error:
            if not isinstance(error, ApiError):
                _LOGGER.exception("the stream of %s failed in the router", self._work.response_id)
                error = internal_error()
            await self._exchange.write(b"data: " + error.body() + b"\n\n", more=False)
            return
        await self._exchange.write(data + self._numbered(self._response.closing()), more=False)

    async def _write_whole(self, ready: Ready, ticket: Ticket) -> None:
        self._take(ready)
        while self._unfinished:
            self._take(await self._next(ticket))
        here = self._work.scored_tokens + sum(len(output.events) for output in self._outputs) <= _DESCRIBED_HERE
        data = self._response.whole() if here else await asyncio.to_thread(self._response.whole)
        await self._exchange.answer(200, data)

    async def _next(self, ticket: Ticket) -> Ready:
        ready = await self._stream.next()
        ticket.answered()
        ticket.generated(len(ready))
        return ready

    def _pieces(self, ready: Ready) -> bytes:
        """The events for new tokens."""
        encoded = self._encoded(ready)
        if self._session is not None:
            self._session.wrote(ready)
        return self._numbered(encoded)

    def _encoded(self, ready: Ready) -> bytes:
        return b"".join([self._response.piece(index, delta) for index, delta in self._take(ready)])

    def _numbered(self, events: bytes) -> bytes:
        return events if self._session is None else self._session.numbered(events)

    def _take(self, ready: Ready) -> list[tuple[int, Delta]]:
        """What the new tokens add to each sequence; raises `ApiError` (429) where their logprobs find no space."""
        self._numbers.take(ready)
        deltas = pushed(self._outputs, ready)
        self._unfinished -= sum(delta.finish is not None for _, delta in deltas)
        return deltas

    # ---- what ends a request early ------------------------------------------------------------------------------

    def _client_gone(self) -> None:
        self._drop(AbortReason.CLIENT_GONE)

    def _overflowed(self) -> None:
        self._metrics.overflows.add()
        self._drop(AbortReason.CLIENT_GONE)

    def _deadline_passed(self) -> None:
        self._abort(AbortReason.DEADLINE)
        self._stream.fail(deadline_passed(self._timeout_s))
        self._exchange.cut()

    def _drop(self, reason: AbortReason) -> None:
        """Nobody reads any more."""
        self._abort(reason)
        self._stream.drop(ClientGoneError())
        self._exchange.cut()

    def _abort(self, reason: AbortReason) -> None:
        for generation in self._generations:
            generation.abort(reason)
