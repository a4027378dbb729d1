"""The router as an ASGI application: routes, and the life of what stands behind them.

`build_asgi` makes a Starlette application. It needs the running event loop only once it serves: `cluster/` then calls
`app.state.members.update(...)` on that loop whenever the directory changes, and exports `app.state.metrics`. Shutdown
(the lifespan's end) aborts what is open and closes the links.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from protocol.endpoints import Identity
from protocol.handshake import LinkRole
from router.admission import Admission
from router.api.chat_model import ChatModel, fingerprint
from router.api.prompts import ModelText
from router.auth import Gate
from router.auth_file import KeyFile
from router.auth_keys import NO_LIMITS
from router.body_space import BodySpace
from router.config import RouterConfig
from router.cors import Cors
from router.dispatcher import Dispatcher
from router.endpoints import RouterCore
from router.errors import ApiError
from router.metrics import RouterMetrics
from router.number_space import NumberSpace
from router.pairing import PairingPolicy
from router.peering import Peering
from router.routes import OPERATIONS, routes
from router.stamp import Stamp, new_router_key
from router.streams.moves import StreamMoves
from router.streams.shelf import Shelf
from router.tenants import TenantBook
from text.chat_template import ChatTemplate
from text.tokenizer import Tokenizer

_SHOWN_PATH = 100


def build_asgi(config: RouterConfig, *, router_id: str | None = None, policy: PairingPolicy | None = None) -> Starlette:
    """The router's application. `router_id` names it to replicas; each call is a new life (boot) of it.

    `app.state` has `members` (MemberTable), `metrics` (RouterMetrics), `dispatcher`, `admission` and `peering`.
    Raises `TokenizerError` or `ChatTemplateError` when the model's folder cannot be read, `BadKeyFile` for a key file
    that cannot.
    """
    core = _make_core(config, router_id=router_id or f"router-{secrets.token_hex(4)}", policy=policy or PairingPolicy())

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await core.moves.start(config.listen_host)
        tasks = [asyncio.create_task(core.shelf.tend())]
        if core.keys is not None:
            tasks.append(asyncio.create_task(core.keys.watch()))
        yield
        for task in tasks:
            task.cancel()
        await core.moves.close()
        await core.dispatcher.close()

    app = Starlette(
        routes=routes(core),
        middleware=[
            Middleware(Cors, origins=config.cors_origins, metrics=core.metrics),
            Middleware(Gate, keys=core.keys, metrics=core.metrics),
        ],
        exception_handlers={HTTPException: _no_such_route},
        lifespan=lifespan,
    )
    app.state.members = core.dispatcher.members
    app.state.metrics = core.metrics
    app.state.dispatcher = core.dispatcher
    app.state.admission = core.admission
    app.state.shelf = core.shelf
    app.state.moves = core.moves
    app.state.peering = Peering(router_key=core.router_key, moves=core.moves, tenants=core.admission.tenants)
    return app


def _make_core(config: RouterConfig, *, router_id: str, policy: PairingPolicy) -> RouterCore:
    metrics = RouterMetrics()
    router_key = new_router_key()
    identity = Identity(role=LinkRole.ROUTER, peer_id=router_id, boot=time.time_ns())
    template = ChatTemplate.load(config.tokenizer_folder, file=config.chat_template)
    keys = None if config.api_keys_file is None else KeyFile(Path(config.api_keys_file), metrics)
    shelf = Shelf(
        window_s=config.resume_window_s,
        max_streams=config.resume_max_streams,
        max_bytes=config.resume_max_bytes,
        clock=time.monotonic,
        metrics=metrics,
    )
    bodies = BodySpace(
        max_bytes=max(config.max_bodies_bytes, config.max_body_bytes),
        retry_after_s=config.retry_after_s,
        metrics=metrics,
    )
    numbers = NumberSpace(
        most=max(config.max_logprobs_together, config.max_logprobs),
        retry_after_s=config.retry_after_s,
        metrics=metrics,
    )
    tenants = TenantBook(
        lambda tenant: NO_LIMITS if keys is None else keys.table.limits(tenant), clock=time.monotonic, metrics=metrics
    )
    return RouterCore(
        config=config,
        router_key=router_key,
        metrics=metrics,
        model=ModelText(
            config=config,
            tokenizer=Tokenizer.load(config.tokenizer_folder),
            chat=None if template is None else ChatModel.of(template, config),
            fingerprint=fingerprint(config, template),
            stamp=Stamp.new(router_key),
        ),
        dispatcher=Dispatcher(config=config, identity=identity, policy=policy, metrics=metrics),
        admission=Admission(config, metrics, tenants),
        bodies=bodies,
        numbers=numbers,
        shelf=shelf,
        moves=StreamMoves(
            shelf, router_key=router_key, secret=config.secret, identity=identity, timings=config.link_timings
        ),
        keys=keys,
        started=int(time.time()),
    )


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path[:_SHOWN_PATH]
    allowed = None
    if error.status_code == 405:
        allowed = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
        message, code = f"{method} is not a method of {path}; use {allowed}", "method_not_allowed"
    else:
        paths = ", ".join(operation.paths[0].replace(":path}", "}") for operation in OPERATIONS)
        message = f"there is nothing at {path}; this server generates text, its endpoints are {paths}"
        code = "not_found"
    refusal = ApiError(error.status_code, message, code=code, headers=None if allowed is None else {"Allow": allowed})
    request.app.state.metrics.requests.add(label=str(error.status_code))
    headers = {name.decode(): value.decode("latin-1") for name, value in refusal.headers()}
    return Response(refusal.body(), error.status_code, headers=headers, media_type="application/json")
