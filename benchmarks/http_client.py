"""A light streaming client for OpenAI-compatible servers that records when each piece of an answer arrived.

Prompts are token ids sent to `/v1/completions`, so that lengths are exact and no tokenizer is needed here. The client
shares the machine with what it measures: it decodes each event into a small struct and does nothing else with it.
One `CompletionClient` lives for one benchmark and pools its connections.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import aiohttp
import msgspec

_JSON = {"Content-Type": "application/json"}


class PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None


class Choice(msgspec.Struct):
    text: str = ""
    finish_reason: str | None = None


class Event(msgspec.Struct):
    choices: list[Choice] = []
    usage: Usage | None = None
    error: object | None = None


class ModelCard(msgspec.Struct):
    id: str


class ModelList(msgspec.Struct):
    data: list[ModelCard]


@dataclass
class Completion:
    """One request as its client saw it, filled while it runs; times are `time.monotonic()` seconds."""

    prompt_tokens: int
    started: float = 0.0
    ended: float = 0.0
    chunk_times: list[float] = field(default_factory=list)
    """When each event that carries output arrived: one per generated token, where the server sends each at once."""
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the first output is there."""
    output_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None
    """None once the server ended the answer properly."""

    @property
    def ttft_s(self) -> float:
        return self.chunk_times[0] - self.started

    @property
    def gaps_s(self) -> list[float]:
        """Inter-token latencies: times between neighbouring events."""
        return [later - earlier for earlier, later in zip(self.chunk_times, self.chunk_times[1:], strict=False)]

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None for answers of one token."""
        if self.output_tokens < 2:
            return None
        return (self.chunk_times[-1] - self.chunk_times[0]) / (self.output_tokens - 1)


class CompletionClient:
    """Greedy, EOS-ignoring completions against one server. An async context manager."""

    def __init__(self, base_url: str, *, model: str | None = None, timeout_s: float = 600.0) -> None:
        """`base_url` without `/v1`. The first served model is taken unless `model` names one."""
        self._base_url = base_url.rstrip("/")
        self._model = model
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._session: aiohttp.ClientSession | None = None
        self._decoder = msgspec.json.Decoder(Event)

    async def __aenter__(self) -> CompletionClient:
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(connector=connector, timeout=self._timeout)
        if self._model is None:
            try:
                self._model = await self._first_model(self._session)
            except BaseException:
                await self._session.close()
                raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._session is not None
        await self._session.close()

    async def complete(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        into: Completion | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Completion:
        """Run one request to its end, with `extra` fields. Failures are in the result's `error`, not raised."""
        assert self._session is not None, "use the client as an async context manager"
        record = into if into is not None else Completion(len(prompt))
        record.error = "the server ended the stream without [DONE]"
        body = {
            "model": self._model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            # Past its end of sequence a model repeats that special token: it must show up as output like any other.
            "skip_special_tokens": False,
            "stream": True,
            "stream_options": {"include_usage": True},
            **(extra or {}),
        }
        url, data = f"{self._base_url}/v1/completions", msgspec.json.encode(body)
        record.started = time.monotonic()
        try:
            async with self._session.post(url, data=data, headers=_JSON) as response:
                if response.status != 200:
                    record.error = f"HTTP {response.status}: {(await response.text())[:300]}"
                else:
                    await self._read(response, record)
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError) as error:
            record.error = f"{type(error).__name__}: {error}"
        record.ended = time.monotonic()
        if record.error is None and not record.chunk_times:
            record.error = "the server sent no token"
        return record

    async def _read(self, response: aiohttp.ClientResponse, record: Completion) -> None:
        async for line in response.content:
            if not line.startswith(b"data:"):
                continue
            now = time.monotonic()
            data = line[5:].strip()
            if data == b"[DONE]":
                record.error = None
                return
            event = self._decoder.decode(data)
            if event.error is not None:
                record.error = str(event.error)
                return
            self._note(event, now, record)

    @staticmethod
    def _note(event: Event, now: float, record: Completion) -> None:
        for choice in event.choices:
            if choice.text or choice.finish_reason is None:
                record.chunk_times.append(now)
                record.begun.set()
            record.finish_reason = choice.finish_reason or record.finish_reason
        if event.usage is not None:
            record.output_tokens = event.usage.completion_tokens
            details = event.usage.prompt_tokens_details
            record.cached_tokens = (details.cached_tokens or 0) if details else 0

    async def _first_model(self, session: aiohttp.ClientSession) -> str:
        async with session.get(f"{self._base_url}/v1/models") as response:
            response.raise_for_status()
            return msgspec.json.decode(await response.read(), type=ModelList).data[0].id
