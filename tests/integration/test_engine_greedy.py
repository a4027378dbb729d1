"""Greedy output of the engine equals transformers' `generate`, token for token, in float32 with the real model.

Alone, batched, chunked and from cached prefixes. Where transformers' own two best logits lie within 1e-4 the outputs
may part; each such place is printed (`pytest -rP` shows them all).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.kv_spec import KVPool
from engine.model.embedded import default_model_folder, fetch_embedded_model
from engine.model.loader import LoadedModel, load_model
from engine.request import Request
from engine.sampling import Sampler
from protocol.sampling import SamplingParams
from tests.integration.greedy_reference import MAX_NEW_TOKENS, Reference, differences, greedy_reference

pytestmark = pytest.mark.integration
_THREADS = 1


@pytest.fixture(scope="module")
def folder() -> Path:
    return fetch_embedded_model(default_model_folder())


@pytest.fixture(scope="module")
def references(folder: Path) -> tuple[Reference, ...]:
    return greedy_reference(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return load_model(folder, dtype="float32", num_threads=_THREADS)


def _engine(model: LoadedModel, *, pool_tokens: int = 16_384, running: int = 64, chunk: int = 512) -> Engine:
    config = EngineConfig(max_total_tokens=pool_tokens, max_running_requests=running, chunked_prefill_size=chunk)
    return Engine(
        model=model,
        pool=KVPool(spec=model.kv_spec(config.page_size), num_pages=config.num_pages),
        config=config,
        sampler=Sampler(num_threads=_THREADS),
    )


def _add(engine: Engine, index: int, reference: Reference) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_NEW_TOKENS)
    engine.add(Request(key=index, prompt=reference.prompt, sampling=sampling))


def _run(engine: Engine, outputs: dict[int, list[int]]) -> dict[int, int]:
    """Run to the end, adding tokens to `outputs`; returns the cached prompt tokens of each request."""
    cached: dict[int, int] = {}
    while engine.has_work():
        output = engine.step()
        assert not output.failed
        for token in output.tokens:
            key = token.request.key
            assert isinstance(key, int)
            outputs.setdefault(key, []).append(token.token)
            if token.cached_tokens is not None:
                cached[key] = token.cached_tokens
    report = engine.audit()
    assert report.idle, report
    return cached


def _list(found: list[str]) -> None:
    for line in found:
        print(line)


def test_each_alone_and_in_one_piece(model: LoadedModel, references: tuple[Reference, ...]) -> None:
    engine = _engine(model, running=1, chunk=4096)
    outputs: dict[int, list[int]] = {}
    for index, reference in enumerate(references):
        engine.flush_cache()
        _add(engine, index, reference)
        assert set(_run(engine, outputs).values()) == {0}
    _list(differences(references, outputs))


def test_batched_in_chunks_and_then_from_cached_prefixes(model: LoadedModel, references: tuple[Reference, ...]) -> None:
    engine = _engine(model)
    for cached in (False, True):
        outputs: dict[int, list[int]] = {}
        for index, reference in enumerate(references):
            _add(engine, index, reference)
        hits = _run(engine, outputs)
        assert all(
            hits[index] == ((len(reference.prompt) - 1) // 16 * 16 if cached else 0)
            for index, reference in enumerate(references)
        )
        _list(differences(references, outputs))


def test_small_chunks_and_preemption(model: LoadedModel, references: tuple[Reference, ...]) -> None:
    short = [reference for reference in references if len(reference.prompt) <= 600]
    engine = _engine(model, pool_tokens=1024, running=24, chunk=48)
    outputs: dict[int, list[int]] = {}
    for index, reference in enumerate(short):
        _add(engine, index, reference)
    _run(engine, outputs)
    _list(differences(short, outputs))
