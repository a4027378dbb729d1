"""GET /openapi.json."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from starlette.types import Scope

from router.endpoints import Endpoint, RouterCore
from router.exchange import Exchange
from router.openapi import Described, document


class Document(Endpoint):
    """The document, made once, at the first request: it takes some milliseconds."""

    def __init__(self, core: RouterCore, operations: Sequence[Described]) -> None:
        super().__init__(core)
        self._operations = operations
        self._json: bytes | None = None

    async def respond(self, exchange: Exchange, scope: Scope) -> None:
        if self._json is None:
            title = f"{self.core.config.model_name}, served with prefill and decode apart"
            found = document(self._operations, title=title, with_keys=self.core.keys is not None)
            self._json = msgspec.json.encode(found)
        await exchange.answer(200, self._json)
