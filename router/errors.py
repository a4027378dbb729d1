"""The one error that reaches clients, in the shape OpenAI's API gives it.

Whatever goes wrong with a request becomes an `ApiError`, raised or handed to its stream; `body` is what goes out, as
the response or, once a stream has begun, as its last event.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from protocol.rooms import FailureCode
from protocol.sampling import Grammar


class ApiError(Exception):
    """A refusal or failure with its HTTP status. `param` names the request's field at fault, if it is one's fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`headers` go out with it, where it is the whole response."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self._headers = headers or {}

    def body(self) -> bytes:
        """The JSON of `{"error": {...}}`."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Those that only this error brings, as ASGI has them."""
        told = dict(self._headers)
        if self.retry_after_s is not None:
            told["Retry-After"] = str(self.retry_after_s)
        return [(name.lower().encode(), value.encode("latin-1")) for name, value in told.items()]


def overloaded(status: int, message: str, *, code: str, retry_after_s: int) -> ApiError:
    """429 when this router is full, 503 when nothing behind it can take the request."""
    kind = "rate_limit_error" if status == 429 else "service_unavailable_error"
    return ApiError(status, message, kind=kind, code=code, retry_after_s=retry_after_s)


def internal_error() -> ApiError:
    """A mistake of ours; what it was stands in the log."""
    return ApiError(500, "the router failed on this request; its log says why", kind="server_error", code="internal")


def deadline_passed(timeout_s: float) -> ApiError:
    """408: the time was the request's to choose, and nothing is wrong with the server."""
    message = (
        f"the request was not finished within its {timeout_s:g} s; ask for fewer tokens, "
        "or for more time with the X-Request-Timeout header"
    )
    return ApiError(408, message, kind="timeout_error", code="deadline_exceeded")


def room_failed(
    code: FailureCode, detail: str, *, epochs: int, retry_after_s: int, grammar: Grammar | None = None
) -> ApiError:
    """What the client hears when the last epoch of its request, which had that `grammar`, failed with `code`."""
    field = grammar.field if grammar is not None else ""
    if code is FailureCode.BAD_GRAMMAR:
        return ApiError(400, f"{field}: {detail}", param=field, code="invalid_grammar")
    if code is FailureCode.NO_GRAMMARS:
        message = f"{field} cannot be served: {detail}"
        return ApiError(501, message, kind="server_error", param=field, code="grammars_unavailable")
    if code is FailureCode.TOO_LONG:
        return ApiError(400, detail, code="context_length_exceeded")
    if code is FailureCode.DEADLINE:
        return ApiError(408, f"a replica ran out of time: {detail}", kind="timeout_error", code="deadline_exceeded")
    message = f"the request failed on {epochs} attempt{'s' if epochs > 1 else ''}, the last with {code.value}: {detail}"
    if code is FailureCode.INTERNAL:
        return ApiError(500, message, kind="server_error", code=code.value)
    return overloaded(503, message + "; try again", code=code.value, retry_after_s=retry_after_s)
