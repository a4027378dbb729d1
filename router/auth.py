"""Who may ask for what: the gate before every endpoint.

An ASGI wrapper. Without a key file it lets everybody in. With one, a request shows its key as
`Authorization: Bearer KEY` or `x-api-key: KEY`; what stands behind the gate finds its `Principal` in the scope. Keys
are never logged.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from router.auth_file import KeyFile
from router.auth_keys import ANYONE, Principal
from router.errors import ApiError
from router.exchange import send_error
from router.metrics import RouterMetrics

OPEN_PATHS = frozenset({"/health", "/liveness", "/readiness", "/ping", "/version", "/openapi.json"})
"""Asked by probes and by people who want to know how to ask: without a key."""

ADMIN_PATHS = frozenset({"/flush_cache", "/abort_request", "/server_info", "/get_server_info", "/internal/state"})
"""Touch or show every tenant's requests: with a key marked admin."""

_SCOPE_KEY = "router.principal"


def principal_of(scope: Scope) -> Principal:
    """Who the request is from, behind the gate."""
    principal = scope.get(_SCOPE_KEY, ANYONE)
    assert isinstance(principal, Principal)
    return principal


class Gate:
    """Wraps the application."""

    def __init__(self, app: ASGIApp, *, keys: KeyFile | None, metrics: RouterMetrics) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys is not None:
            try:
                scope[_SCOPE_KEY] = self._admit(scope, self._keys)
            except ApiError as error:
                self._metrics.requests.add(label=str(error.status))
                await send_error(send, error)
                return
        await self._app(scope, receive, send)

    def _admit(self, scope: Scope, keys: KeyFile) -> Principal:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in OPEN_PATHS:
            return Principal("")
        key = _presented(scope)
        if key is None:
            raise _unauthorized(
                "no API key was given; send one in the header `Authorization: Bearer KEY` (or `x-api-key: KEY`)",
                code="missing_api_key",
            )
        principal = keys.table.find(key)
        if principal is None:
            raise _unauthorized("the API key is not one of this server's; check it", code="invalid_api_key")
        if path in ADMIN_PATHS and not principal.admin:
            message = f"{path} acts on everybody's requests; use a key that is marked admin"
            raise ApiError(403, message, kind="permission_error", code="admin_key_needed")
        return principal


def _presented(scope: Scope) -> str | None:
    """The key a request shows, if any; `Authorization` goes before `x-api-key`."""
    headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
    if (authorization := headers.get(b"authorization")) is not None:
        scheme, _, key = authorization.partition(" ")
        return key.strip() or None if scheme.lower() == "bearer" else None
    return headers.get(b"x-api-key") or None


def _unauthorized(message: str, *, code: str) -> ApiError:
    return ApiError(401, message, kind="authentication_error", code=code, headers={"WWW-Authenticate": "Bearer"})
