"""Cross-origin requests: which web pages may use the API from a browser.

An ASGI wrapper before the gate, because a preflight carries no key. Off where no origin is configured. Credentials
(cookies) are never allowed: keys travel in headers, which scripts must set themselves.
"""

from __future__ import annotations

from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.errors import ApiError
from router.exchange import send_error
from router.metrics import RouterMetrics

_EXPOSED = ", ".join(
    [
        "Retry-After",
        *(f"X-RateLimit-{what}-{of}" for of in ("Requests", "Tokens") for what in ("Limit", "Remaining", "Reset")),
    ]
)
_PREFLIGHT_S = 600
_ANY = "*"


class Cors:
    """Wraps the application; `origins` as "https://app.example.com", or "*" for all."""

    def __init__(self, app: ASGIApp, *, origins: Collection[str], metrics: RouterMetrics) -> None:
        self._app = app
        self._origins = frozenset(origins)
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._origins:
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get(b"origin")
        allowed = origin is not None and (origin in self._origins or _ANY in self._origins)

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *self._marks(origin if allowed else None)]
            await send(message)

        if scope["method"] == "OPTIONS" and origin is not None and b"access-control-request-method" in headers:
            await self._preflight(send_marked, origin, headers, allowed=allowed)
        else:
            await self._app(scope, receive, send_marked)

    async def _preflight(self, send: Send, origin: str, headers: dict[bytes, str], *, allowed: bool) -> None:
        self._metrics.requests.add(label="204" if allowed else "403")
        if not allowed:
            message = f"the origin {origin[:100]!r} may not use this API; add it to router.cors_origins"
            await send_error(send, ApiError(403, message, kind="permission_error", code="origin_not_allowed"))
            return
        wanted = headers.get(b"access-control-request-headers", "Authorization, Content-Type")
        answer = {
            "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
            "Access-Control-Allow-Headers": wanted,
            "Access-Control-Max-Age": str(_PREFLIGHT_S),
        }
        encoded = [(name.lower().encode(), value.encode("latin-1")) for name, value in answer.items()]
        await send({"type": "http.response.start", "status": 204, "headers": encoded})
        await send({"type": "http.response.body", "body": b""})

    def _marks(self, allowed: str | None) -> list[tuple[bytes, bytes]]:
        """Headers of an answer to a page of the `allowed` origin, if it is one."""
        marks = [] if _ANY in self._origins else [(b"vary", b"Origin")]
        if allowed is not None:
            origin = _ANY if _ANY in self._origins else allowed
            marks.append((b"access-control-allow-origin", origin.encode("latin-1")))
            marks.append((b"access-control-expose-headers", _EXPOSED.encode()))
        return marks
