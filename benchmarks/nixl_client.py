"""A client of two vLLM servers, one that prefills and one that decodes, joined by its NixlConnector.

It does what vLLM's proxies do: ask prefill for one token, hand its answer's `kv_transfer_params` to decode, and read
decode's stream, which begins with that token once more. Lifecycle as that of `CompletionClient`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import aiohttp

from benchmarks.http_client import Completion, CompletionClient

_ASK_FOR_KV = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class NixlPairClient:
    """Greedy completions, prefilled by one server and decoded by the other."""

    def __init__(self, prefill_url: str, decode_url: str, *, timeout_s: float = 600.0) -> None:
        self._prefill_url = prefill_url.rstrip("/")
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._session: aiohttp.ClientSession | None = None
        self._decode = CompletionClient(decode_url, timeout_s=timeout_s)
        self.prefilled_at = 0.0
        """When the last request's prefill answered, by `time.monotonic()`."""

    async def __aenter__(self) -> NixlPairClient:
        await self._decode.__aenter__()
        self._session = aiohttp.ClientSession(timeout=self._timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._session is not None
        await self._session.close()
        await self._decode.__aexit__(kind, error, trace)

    async def complete(self, prompt: Sequence[int], *, max_tokens: int) -> Completion:
        """One request to its end; its clock starts before prefill. Failures are in the result's `error`."""
        assert self._session is not None, "use the client as an async context manager"
        record = Completion(len(prompt))
        started = time.monotonic()
        body = {"prompt": list(prompt), "max_tokens": 1, "temperature": 0, "kv_transfer_params": _ASK_FOR_KV}
        try:
            async with self._session.post(f"{self._prefill_url}/v1/completions", json=body) as response:
                answer = await response.json()
            if response.status != 200:
                record.error = f"prefill: HTTP {response.status}: {answer}"
                return record
        except (aiohttp.ClientError, TimeoutError) as error:
            record.error = f"prefill: {type(error).__name__}: {error}"
            return record
        self.prefilled_at = time.monotonic()
        handover: dict[str, Any] = answer["kv_transfer_params"]
        await self._decode.complete(prompt, max_tokens=max_tokens, into=record, extra={"kv_transfer_params": handover})
        record.started = started
        return record
