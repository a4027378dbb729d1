"""What every endpoint has in common.

An endpoint is a small ASGI application. It answers every request, with an `ApiError`'s own words or, for a mistake of
ours, a 500 that says no more than that; and it counts what it answered.
"""

from __future__ import annotations

import abc
import asyncio
import logging
import math
from dataclasses import dataclass

from starlette.types import Receive, Scope, Send

from router.admission import Admission
from router.api.prompts import ModelText
from router.auth_file import KeyFile
from router.body_space import BodySpace
from router.config import RouterConfig
from router.dispatcher import Dispatcher
from router.errors import ApiError, internal_error
from router.exchange import ClientGoneError, Exchange
from router.metrics import RouterMetrics
from router.number_space import NumberSpace
from router.streams.moves import StreamMoves
from router.streams.shelf import Shelf

_CLIENT_CLOSED = "499"
"""The status that logs and metrics give a request whose client left before there was one."""

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RouterCore:
    """The parts of one router, made once."""

    config: RouterConfig
    router_key: str
    """What stamps call this router."""
    metrics: RouterMetrics
    model: ModelText
    dispatcher: Dispatcher
    admission: Admission
    bodies: BodySpace
    numbers: NumberSpace
    shelf: Shelf
    moves: StreamMoves
    keys: KeyFile | None
    """None where everybody is let in."""
    started: int
    """Unix time."""


class Endpoint(abc.ABC):
    """Subclasses write `respond`; what it raises becomes the answer."""

    def __init__(self, core: RouterCore) -> None:
        self.core = core

    @abc.abstractmethod
    async def respond(self, exchange: Exchange, scope: Scope) -> None:
        """Answer one request; may raise `ApiError` before anything was sent, and `ClientGoneError` at any time."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        core = self.core
        began = asyncio.get_running_loop().time()
        exchange = Exchange(scope, receive, send, send_timeout_s=core.config.send_timeout_s, bodies=core.bodies)
        try:
            await self._answered(exchange, scope)
        except ClientGoneError:
            pass  # returning without a complete response makes the server close the connection
        finally:
            exchange.close()
            core.metrics.requests.add(label=_CLIENT_CLOSED if exchange.status is None else str(exchange.status))
            core.metrics.request_s.observe(asyncio.get_running_loop().time() - began)

    async def _answered(self, exchange: Exchange, scope: Scope) -> None:
        try:
            await self.respond(exchange, scope)
        except ApiError as error:
            await exchange.refuse(error)
        except ClientGoneError:
            raise
        except Exception:
            _LOGGER.exception("a request to %s failed in the router", scope["path"])
            if exchange.status is not None:
                raise ClientGoneError from None
            await exchange.refuse(internal_error())


def request_timeout_s(exchange: Exchange, config: RouterConfig) -> float:
    """What X-Request-Timeout allows, at most the configured time; raises `ApiError` (400) when it makes no sense."""
    header = exchange.header(b"x-request-timeout")
    if header is None:
        return config.request_timeout_s
    try:
        timeout_s = float(header)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s < math.inf:
        message = f"X-Request-Timeout is {header!r}; give a positive number of seconds"
        raise ApiError(400, message, param="X-Request-Timeout", code="invalid_value")
    return min(timeout_s, config.request_timeout_s)
