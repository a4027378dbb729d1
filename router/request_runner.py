"""Runs one request's work and writes its response.

Lifecycle: admit, start every sequence, then write what their tokens make until the last has finished. The status goes
out with the first token or the first error. Whatever ends the request early - the client leaves or stops reading, the
deadline passes, a sequence fails for good - aborts every sequence that is still open, and the client, if it is there,
gets the error: as the response, or as the last event of a stream that has begun.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence
from operator import itemgetter

from protocol.rooms import AbortReason
from router.admission import Admission
from router.api.response import ResponseFormat
from router.config import RouterConfig
from router.dispatcher import Dispatcher
from router.errors import ApiError, deadline_passed, internal_error
from router.exchange import EVENT_STREAM, ClientGoneError, Exchange
from router.generation import Generation
from router.metrics import RouterMetrics
from router.token_stream import Ready, TokenStream
from router.work import Delta, SequenceOutput, Work

_STREAM_HEADERS = [(b"content-type", EVENT_STREAM), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]

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
        config: RouterConfig,
        metrics: RouterMetrics,
        received_at: float,
        timeout_s: float,
    ) -> None:
        """`received_at` is when the request came, by the loop's clock; its deadline is `timeout_s` later."""
        self._exchange = exchange
        self._work = work
        self._outputs = outputs
        self._response = response
        self._dispatcher = dispatcher
        self._admission = admission
        self._metrics = metrics
        self._received_at = received_at
        self._timeout_s = timeout_s
        self._unfinished = len(work.jobs)
        self._generations: list[Generation] = []
        self._stream = TokenStream(
            max_buffered=config.max_buffered_tokens * len(work.jobs), on_overflow=self._overflowed
        )

    async def run(self) -> None:
        """Write the response; raises `ApiError` while none has begun, and `ClientGoneError` for nobody to write to."""
        ticket = self._admission.admit(sequences=len(self._work.jobs), prompt_tokens=self._work.prompt_tokens)
        watcher = asyncio.create_task(self._exchange.watch(self._client_gone))
        deadline = self._received_at + self._timeout_s
        timer = asyncio.get_running_loop().call_at(deadline, self._deadline_passed)
        try:
            self._start(deadline)
            ready = await self._stream.next()
            ticket.answered()
            if self._work.stream:
                await self._write_stream(ready)
            else:
                await self._write_whole(ready)
        except ClientGoneError:
            self._abort(AbortReason.CLIENT_GONE)
            raise
        finally:
            timer.cancel()
            watcher.cancel()
            ticket.close()
            self._abort(AbortReason.PEER_FAILED)  # of those that are open still: another sequence has failed for good

    def _start(self, deadline: float) -> None:
        for index, job in enumerate(self._work.jobs):
            self._generations.append(
                self._dispatcher.generate(
                    request_id=f"{self._work.response_id}.{index}",
                    job=job,
                    index=index,
                    received_at=self._received_at,
                    deadline=deadline,
                    stream=self._stream,
                    timeline=self._outputs[index].timeline,
                    scores=self._outputs[index].scores,
                )
            )

    async def _write_stream(self, ready: Ready) -> None:
        await self._exchange.start(200, _STREAM_HEADERS)
        data = self._response.opening() + self._pieces(ready)
        try:
            while self._unfinished:
                if data:
                    await self._exchange.write(data, more=True)
                data = self._pieces(await self._stream.next())
        except ClientGoneError:
            raise
        except Exception as error:
            if not isinstance(error, ApiError):
                _LOGGER.exception("the stream of %s failed in the router", self._work.response_id)
                error = internal_error()
            await self._exchange.write(b"data: " + error.body() + b"\n\n", more=False)
            return
        await self._exchange.write(data + self._response.closing(), more=False)

    async def _write_whole(self, ready: Ready) -> None:
        self._take(ready)
        while self._unfinished:
            self._take(await self._stream.next())
        await self._exchange.answer(200, self._response.whole())

    def _pieces(self, ready: Ready) -> bytes:
        return b"".join([self._response.piece(index, delta) for index, delta in self._take(ready)])

    def _take(self, ready: Ready) -> list[tuple[int, Delta]]:
        """What the new tokens add to each sequence."""
        if len(self._outputs) > 1:
            ready.sort(key=itemgetter(0))  # stable: tokens of one sequence stay in order
        deltas = []
        for index, group in itertools.groupby(ready, key=itemgetter(0)):
            delta = self._outputs[index].push([event for _, event in group])
            deltas.append((index, delta))
            if delta.finish is not None:
                self._unfinished -= 1
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
