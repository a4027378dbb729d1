"""A short generation that shows whether tokens come; whoever asks while one runs shares its outcome."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass

from protocol.rooms import AbortReason, Job
from protocol.sampling import SamplingParams
from router.endpoints import RouterCore
from router.errors import ApiError, overloaded
from router.exchange import ClientGoneError, Exchange
from router.token_stream import TokenStream

_TOKENS = 2
"""One from each pool."""
PROBE_TIMEOUT_S = 30.0


@dataclass
class _Run:
    """Ends by itself after `PROBE_TIMEOUT_S`, or when the last of those who wait for it leaves."""

    waiting: int = 0
    tokens: int = 0
    task: asyncio.Task[float] | None = None


class HealthProbe:
    """One run at a time, so that those who ask, whom admission does not see, cannot load the replicas."""

    def __init__(self, core: RouterCore) -> None:
        self._core = core
        self._run: _Run | None = None

    async def seconds(self, exchange: Exchange, *, timeout_s: float) -> float:
        """How long the tokens took; raises `ApiError` where they do not come, and `ClientGoneError`."""
        run = self._run
        if run is None:
            run = self._run = _Run()
            run.task = asyncio.create_task(self._generate(run))
        assert run.task is not None
        run.waiting += 1
        gone = asyncio.create_task(exchange.watch(lambda: None))
        try:
            await asyncio.wait({run.task, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if run.task.done():
                return run.task.result()
            if gone.done():
                raise ClientGoneError
            raise self._late(run, timeout_s)
        finally:
            gone.cancel()
            run.waiting -= 1
            if not run.waiting:
                run.task.cancel()
                self._forget(run)

    async def _generate(self, run: _Run) -> float:
        core, loop = self._core, asyncio.get_running_loop()
        stream = TokenStream(max_buffered=_TOKENS, on_overflow=lambda: None)
        sampling = SamplingParams(temperature=0.0, max_tokens=_TOKENS, ignore_eos=True)
        began = loop.time()
        generation = core.dispatcher.generate(
            request_id=f"health-{secrets.token_hex(8)}.0",
            job=Job(prompt=core.model.tokenizer.encode("health"), sampling=sampling),
            index=0,
            received_at=began,
            deadline=began + PROBE_TIMEOUT_S,
            stream=stream,
        )
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                while run.tokens < _TOKENS:
                    run.tokens += len(await stream.next())
        except TimeoutError as error:
            raise self._late(run, PROBE_TIMEOUT_S) from error
        finally:
            generation.abort(AbortReason.DEADLINE)
            self._forget(run)
        return loop.time() - began

    def _forget(self, run: _Run) -> None:
        """Who asks from now on starts another."""
        if self._run is run:
            self._run = None

    def _late(self, run: _Run, timeout_s: float) -> ApiError:
        message = f"{run.tokens} of {_TOKENS} tokens came within {timeout_s:g} s"
        return overloaded(503, message, code="unhealthy", retry_after_s=self._core.config.retry_after_s)
