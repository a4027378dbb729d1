"""Endpoints that act on what is under way: ending requests, and dropping prefix caches."""

from __future__ import annotations

import math
from urllib.parse import parse_qsl

from pydantic import Field
from starlette.types import Scope

from router.api.fields import ApiModel, invalid, read_body, shown
from router.endpoints import Endpoint
from router.errors import ApiError
from router.exchange import Exchange


class AbortRequest(ApiModel):
    rid: str = Field("", max_length=256)
    """A request's own `rid`, that of one of its prompts or outputs, or a response's id."""
    abort_all: bool = False


class AbortRequests(Endpoint):
    """POST /abort_request: as SGLang's. What is ended answers with what it has, and with the finish reason "abort".

    Requests of other routers hear of it by way of the replicas, a moment after the answer here.
    """

    async def respond(self, exchange: Exchange, scope: Scope) -> None:
        config = self.core.config
        body = await exchange.body(max_bytes=config.max_body_bytes, timeout_s=config.body_timeout_s)
        request = read_body(AbortRequest, body)
        if not request.rid and not request.abort_all:
            raise invalid("rid", "it names no request; give its rid, or set abort_all to true")
        ended = self.core.dispatcher.end_requests(None if request.abort_all else request.rid)
        await exchange.answer_json(200, {"success": True, "sequences_ended_here": ended})


class FlushCaches(Endpoint):
    """GET or POST /flush_cache: every replica drops its cached prefixes, if nothing is open there.

    Else 400, and nothing was done at those that are busy. `?timeout=` waits that many seconds for them.
    """

    async def respond(self, exchange: Exchange, scope: Scope) -> None:
        timeout_s = _timeout_s(scope, most=self.core.config.request_timeout_s)
        answers = await self.core.dispatcher.flush.run(timeout_s=timeout_s)
        found = {
            replica_id: {"answered": False} if answer is None else {"pages": answer.pages, "open_rooms": answer.rooms}
            for replica_id, answer in answers.items()
        }
        left = [replica_id for replica_id, answer in answers.items() if answer is None or answer.rooms]
        if left:
            message = (
                f"the caches of {', '.join(left)} are not flushed, because requests are under way there or it gave no "
                "answer; wait for them, here by ?timeout=SECONDS"
            )
            raise ApiError(400, message, code="busy")
        await exchange.answer_json(200, {"success": True, "replicas": found})


def _timeout_s(scope: Scope, *, most: float) -> float:
    given = dict(parse_qsl(scope["query_string"].decode("latin-1"))).get("timeout", "0")
    try:
        timeout_s = float(given)
    except ValueError:
        timeout_s = math.nan
    if not 0 <= timeout_s < math.inf:
        raise invalid("timeout", f"{shown(given)} is no number of seconds; give one from 0 on")
    return min(timeout_s, most)
