"""Runs a toy engine to its end and gathers what it said: shared by the engine's tests."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from engine.engine import Engine
from engine.outputs import StepOutput, TokenOutput
from engine.request import Request
from protocol.sampling import FinishReason, SamplingParams


def greedy(max_tokens: int, **more: object) -> SamplingParams:
    """Parameters of a greedy request."""
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **more)  # type: ignore[arg-type]


def request(key: Hashable, prompt: Sequence[int], max_tokens: int, **more: object) -> Request:
    """A greedy request."""
    return Request(key=key, prompt=list(prompt), sampling=greedy(max_tokens), **more)  # type: ignore[arg-type]


def step(engine: Engine) -> StepOutput:
    """One step, after which the books must balance."""
    output = engine.step()
    report = engine.audit()
    assert report.balanced, report.problems
    return output


def run(engine: Engine, *, limit: int = 2000) -> dict[Hashable, list[TokenOutput]]:
    """Step until nothing is left to do; the token outputs of each request in order."""
    outputs: dict[Hashable, list[TokenOutput]] = {}
    for _ in range(limit):
        if not engine.has_work():
            return outputs
        output = step(engine)
        assert not output.failed
        for token in output.tokens:
            outputs.setdefault(token.request.key, []).append(token)
    raise AssertionError(f"the engine is not done after {limit} steps")


def tokens_of(outputs: Sequence[TokenOutput]) -> list[int]:
    """The tokens alone."""
    return [output.token for output in outputs]


def assert_idle(engine: Engine) -> None:
    """Nothing is registered and every page is free or in the cache."""
    report = engine.audit()
    assert report.idle, report
    load = engine.load()
    assert (load.waiting_requests, load.running_requests, load.waiting_tokens) == (0, 0, 0)
    assert load.free_pages + load.cached_pages == load.total_pages


def ends(engine: Engine) -> tuple[dict[object, FinishReason | None], dict[object, str]]:
    """How each request finished, and which failed by their grammars and why."""
    finished: dict[object, FinishReason | None] = {}
    failed: dict[object, str] = {}
    while engine.has_work():
        output = step(engine)
        finished |= {token.request.key: token.finish for token in output.tokens if token.finish is not None}
        assert all(each.by_grammar for each in output.failed)
        failed |= {each.request.key: each.why for each in output.failed}
    assert_idle(engine)
    return finished, failed
