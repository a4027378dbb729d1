"""A client that streams one completion and says exactly what became of it, whatever happens to the server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp


@dataclass
class Outcome:
    """Exactly one of `finish`, `error` and `broken` is set at the end, unless the client hung up."""

    text: str = ""
    events: int = 0
    finish: str | None = None
    completion_tokens: int | None = None
    status: int | None = None
    error: dict[str, Any] | None = None
    """The API's error object, sent instead of an answer or in the middle of it."""
    broken: str | None = None
    """The connection failed or ended without saying how."""
    begun: asyncio.Event = field(default_factory=asyncio.Event)


async def stream_completion(
    session: aiohttp.ClientSession,
    url: str,
    prompt: list[int],
    *,
    max_tokens: int,
    hang_up_after: int | None = None,
    on_event: Callable[[Outcome], None] = lambda outcome: None,
    into: Outcome | None = None,
) -> Outcome:
    """Stream a greedy completion of token ids; with `hang_up_after`, close the connection after so many events."""
    outcome = into or Outcome()
    body = {
        "model": "SmolLM2-135M-Instruct",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    try:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            outcome.status = response.status
            if response.status != 200:
                outcome.error = (await response.json())["error"]
                return outcome
            async for line in response.content:
                if not line.startswith(b"data:") or line == b"data: [DONE]\n":
                    continue
                _note(json.loads(line[5:]), outcome)
                on_event(outcome)
                if hang_up_after is not None and outcome.events >= hang_up_after:
                    response.close()
                    return outcome
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        outcome.broken = f"{type(error).__name__}: {error}"
        return outcome
    if outcome.finish is None and outcome.error is None:
        outcome.broken = "the stream ended without a finish reason or an error"
    return outcome


def _note(event: dict[str, Any], outcome: Outcome) -> None:
    if "error" in event:
        outcome.error = event["error"]
    for choice in event.get("choices", []):
        outcome.text += choice["text"]
        outcome.events += 1
        outcome.finish = choice["finish_reason"] or outcome.finish
        outcome.begun.set()
    if event.get("usage"):
        outcome.completion_tokens = event["usage"]["completion_tokens"]
