"""The endpoints that generate: one for each API, and the one to which a client comes back for the rest of a stream.

A streamed response can be come back to for `resume_window_s` after its connection has ended, in one of two ways: by the
same POST again, or by GET /v1/streams/{id}, both with the id of the last event received in `Last-Event-ID`. The stream
may be another router's; it then moves here. Where that router is gone, the POST generates the stream once more.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace

from starlette.types import Scope

from router.api.prompts import ModelText
from router.api.response import ResponseFormat
from router.auth import principal_of
from router.endpoints import Endpoint, RouterCore, request_timeout_s
from router.errors import ApiError
from router.exchange import Exchange
from router.request_runner import RequestRunner
from router.stamp import Stamp, token_of
from router.streams.event_id import Place, parse_event_id
from router.streams.moves import StreamLostError
from router.streams.record import StreamRecord
from router.streams.session import StreamSession
from router.work import SequenceOutput, Work

Parser = Callable[[bytes, ModelText], Awaitable[tuple[Work, list[SequenceOutput], ResponseFormat]]]


@dataclass(frozen=True)
class _Asked:
    """One request, apart from its body."""

    exchange: Exchange
    received_at: float
    timeout_s: float
    tenant: str
    last_event_id: str | None


def _asked(core: RouterCore, exchange: Exchange, scope: Scope) -> _Asked:
    return _Asked(
        exchange,
        received_at=asyncio.get_running_loop().time(),
        timeout_s=request_timeout_s(exchange, core.config),
        tenant=principal_of(scope).tenant,
        last_event_id=exchange.header(b"last-event-id"),
    )


class Generate(Endpoint):
    """Reads a request by its API's parser, runs its work and writes its response."""

    def __init__(self, core: RouterCore, path: str, parse: Parser) -> None:
        super().__init__(core)
        self._path = path
        self._parse = parse

    async def respond(self, exchange: Exchange, scope: Scope) -> None:
        asked = _asked(self.core, exchange, scope)
        record, seen, lost = await self._record(asked)
        await _run(self.core, asked, self._parse, record, seen=seen, lost=lost)

    async def _record(self, asked: _Asked) -> tuple[StreamRecord, int, Place | None]:
        """What is asked, how many events of it the client has, and the last one's place where the stream is lost.

        The record alone has the body, so that it can be let go of once it has been read.
        """
        core, config = self.core, self.core.config
        body = await asked.exchange.body(max_bytes=config.max_body_bytes, timeout_s=config.body_timeout_s)
        if asked.last_event_id is None:
            stamp = Stamp.new(core.router_key, tenant=asked.tenant)
            return StreamRecord(stamp=stamp, path=self._path, body=body), 0, None
        last = parse_event_id(asked.last_event_id)
        try:
            record = await _claimed(core, last.token, asked.tenant)
        except StreamLostError:
            if last.place is None or core.shelf.knows(last.token):
                raise
            stamp, rooms = Stamp(last.token, asked.tenant), f"~{secrets.token_hex(4)}"
            return StreamRecord(stamp=stamp, path=self._path, body=body, rooms=rooms), last.number, last.place
        try:
            record.check_is_asked_again(self._path, body)
        except ApiError:
            _give_back(core, record)
            raise
        return record, last.number, None


class ComeBack(Endpoint):
    """GET /v1/streams/{id}, where the id is the response's: the events after `Last-Event-ID`, or all without it."""

    def __init__(self, core: RouterCore, parsers: Mapping[str, Parser]) -> None:
        """`parsers` by the paths of their endpoints."""
        super().__init__(core)
        self._parsers = parsers

    async def respond(self, exchange: Exchange, scope: Scope) -> None:
        core = self.core
        asked = _asked(core, exchange, scope)
        token = token_of(scope["path_params"]["id"])
        if token is None:
            raise ApiError(404, "there is no such stream; the id is that of its response", code="stream_not_found")
        seen = 0
        if asked.last_event_id is not None:
            last = parse_event_id(asked.last_event_id)
            seen = last.number
            if last.token != token:
                message = "Last-Event-ID names an event of another stream than the path"
                raise ApiError(400, message, param="Last-Event-ID", code="stream_mismatch")
        record = await _claimed(core, token, asked.tenant)
        await _run(core, asked, self._parsers[record.path], record, seen=seen)


async def _claimed(core: RouterCore, token: str, tenant: str) -> StreamRecord:
    record = await core.moves.claim(token, tenant, owner=Stamp(token).owner)
    core.metrics.resumed_streams.add()
    return record


def _give_back(core: RouterCore, record: StreamRecord) -> None:
    core.shelf.begin(record)
    core.shelf.keep(record)


async def _run(
    core: RouterCore, asked: _Asked, parse: Parser, record: StreamRecord, *, seen: int, lost: Place | None = None
) -> None:
    """Answer by what the record asks for; it is on the shelf afterwards, if it can be come back to."""
    core.shelf.begin(record)
    try:
        work, outputs, response = await parse(record.body, replace(core.model, stamp=record.stamp))
        session = None
        if not work.stream:
            record.body = b""
        elif why := _why_unkept(core, work, record):
            record.leave_unkept(why)
        else:
            single = len(work.jobs) == 1
            session = StreamSession(record, response_id=work.response_id, single=single, seen=seen, lost=lost)
        asked.exchange.body_is_read()  # a stream that keeps it has the shelf's space for it
        if lost is not None and (session is None or len(work.jobs) > 1):
            raise StreamLostError
        runner = RequestRunner(
            asked.exchange,
            work,
            outputs,
            response,
            dispatcher=core.dispatcher,
            admission=core.admission,
            numbers=core.numbers.hold(work.jobs),
            config=core.config,
            metrics=core.metrics,
            received_at=asked.received_at,
            timeout_s=asked.timeout_s,
            tenant=asked.tenant,
            session=session,
        )
        await runner.run()
    finally:
        core.shelf.keep(record)


def _why_unkept(core: RouterCore, work: Work, record: StreamRecord) -> str:
    """Why this stream cannot be come back to; "" for one that can, whose request has its space from now on."""
    if not core.config.resume_window_s:
        return "streams cannot be come back to here, router.resume_window_s is 0; send the request again"
    if any(job.timeline for job in work.jobs):
        return "a stream with return_timeline cannot be come back to; send the request again, or without that"
    if not core.shelf.hold(record):
        return "there was no space to keep what the stream asked for (router.resume_max_mb); send the request again"
    return ""
