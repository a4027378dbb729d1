"""Scores of prompts: the engine's equal those of a model that computes each prompt whole, however it is scheduled."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from engine.batch import Batch
from engine.config import EngineConfig
from engine.engine import Engine
from engine.kv_spec import KVPool
from engine.model.loader import LoadedModel, load_model
from engine.request import Request
from engine.sampling import Sampler
from protocol.sampling import SamplingParams
from protocol.scoring import PositionScores, Scoring
from tests.unit.engine_driver import assert_idle, greedy, step, tokens_of
from tests.unit.tiny_models import SIZES, random_sequences, reference_logits, save_random_model
from tests.unit.toy_model import VOCAB, ToyLimits, ToyModel, toy_engine, toy_generate, toy_logits

_NAMED = (5, 11, 96)


def _expected(rows: Sequence[torch.Tensor], tokens: Sequence[int], scoring: Scoring) -> PositionScores:
    """The scores of `tokens` from position `scoring.start` on; `rows[i]` are the logits before the i-th of them."""
    logits = torch.stack(list(rows)).double()
    logprobs = logits - logits.logsumexp(dim=1, keepdim=True)
    own = logprobs.gather(1, torch.tensor(tokens[scoring.start :])[:, None])
    best = logprobs.topk(scoring.top, dim=1)
    return PositionScores(
        first=scoring.start,
        logprobs=own[:, 0].tolist(),
        ranks=((logprobs > own).sum(dim=1) + 1).tolist() if scoring.ranks else [],
        top_tokens=best.indices.ravel().tolist(),
        top_logprobs=best.values.ravel().tolist(),
        tokens=logprobs[:, list(scoring.tokens)].ravel().tolist(),
    )


def _joined(pieces: Sequence[PositionScores]) -> PositionScores:
    """Pieces in order, none missing and none twice."""
    whole = pieces[0]
    for piece in pieces[1:]:
        assert piece.first == whole.first + len(whole.logprobs)
        whole = PositionScores(
            whole.first,
            whole.logprobs + piece.logprobs,
            whole.ranks + piece.ranks,
            whole.top_tokens + piece.top_tokens,
            whole.top_logprobs + piece.top_logprobs,
            whole.tokens + piece.tokens,
        )
    return whole


def _assert_equal(found: PositionScores, expected: PositionScores, *, within: float) -> None:
    assert (found.first, found.ranks, found.top_tokens) == (expected.first, expected.ranks, expected.top_tokens)
    for ours, theirs in (
        (found.logprobs, expected.logprobs),
        (found.top_logprobs, expected.top_logprobs),
        (found.tokens, expected.tokens),
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=within)


def _run(engine: Engine) -> tuple[dict[Hashable, PositionScores], dict[Hashable, list[int]]]:
    """Run to the end; every prompt's scores, complete before its first token, and the tokens."""
    pieces: dict[Hashable, list[PositionScores]] = {}
    tokens: dict[Hashable, list[int]] = {}
    while engine.has_work():
        output = step(engine)
        assert not output.failed
        for request, scores in output.scores:
            assert request.key not in tokens
            pieces.setdefault(request.key, []).append(scores)
        for token in output.tokens:
            assert token.request.next_score == token.request.num_prompt_tokens
            tokens.setdefault(token.request.key, []).append(token.token)
    return {key: _joined(each) for key, each in pieces.items()}, tokens


_CASES = st.lists(
    st.tuples(st.integers(2, 60), st.integers(1, 59), st.integers(0, 4), st.booleans()), min_size=1, max_size=5
)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(_CASES, st.sampled_from([8, 12, 64]), st.sampled_from([24, 200]), st.sampled_from([1, 7, 1000]))
def test_scores_do_not_depend_on_chunks_cached_prefixes_or_preemption(
    cases: list[tuple[int, int, int, bool]], chunk: int, pages: int, scored_at_once: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.engine.max_scored_tokens", lambda vocab_size: scored_at_once)
        engine, _ = toy_engine(pages=pages, chunked_prefill_size=chunk, decode_headroom_tokens=0)
    prompts = [[(7 * place) % VOCAB for place in range(length)] for length, _, _, _ in cases]
    for again in range(2):  # the second time every prompt is in the cache
        wanted = {}
        for index, (length, start, top, full) in enumerate(cases):
            scoring = Scoring(min(start, length - 1), top, _NAMED if full else (), full)
            request = Request(
                key=(again, index), prompt=prompts[index], sampling=greedy(12), scoring=scoring, retain=False
            )
            wanted[again, index] = scoring
            engine.add(request)
        scores, tokens = _run(engine)
        for (_, index), scoring in wanted.items():
            prompt = prompts[index]
            rows = [toy_logits(prompt[:end]) for end in range(scoring.start, len(prompt))]
            _assert_equal(scores[again, index], _expected(rows, prompt, scoring), within=1e-6)
            assert tokens[again, index] == toy_generate(prompt, 12)
        assert_idle(engine)


def test_a_cached_prefix_serves_up_to_the_first_scored_token() -> None:
    engine, model = toy_engine(page_size=4)
    prompt = [(3 * place) % VOCAB for place in range(41)]
    engine.add(Request(key="before", prompt=prompt, sampling=greedy(1)))
    _run(engine)
    for start, cached in ((1, 0), (4, 0), (5, 4), (32, 28), (33, 32), (40, 36), (41, 40)):
        model.computed_tokens = 0
        request = Request(key=start, prompt=prompt, sampling=greedy(1), scoring=Scoring(start))
        engine.add(request)
        scores, _ = _run(engine)
        assert model.computed_tokens == 41 - cached
        assert [len(each.logprobs) for each in scores.values()] == ([41 - start] if start < 41 else [])


def test_a_retained_prompt_is_scored_and_kept() -> None:
    engine, _ = toy_engine(chunked_prefill_size=8)
    prompt = list(range(30))
    engine.add(Request(key="room", prompt=prompt, sampling=greedy(5), scoring=Scoring(1), retain=True))
    scores, tokens = _run(engine)
    assert len(scores["room"].logprobs) == 29
    assert len(tokens["room"]) == 1
    engine.release("room")
    assert_idle(engine)


def test_generated_tokens_tell_the_named_logprobs() -> None:
    engine, _ = toy_engine(sampler=Sampler())
    sampling = SamplingParams(temperature=0.0, max_tokens=3, logprobs=0, logprob_tokens=_NAMED)
    engine.add(Request(key="r", prompt=[1, 2, 3], sampling=sampling))
    outputs = [token for _ in range(3) for token in step(engine).tokens]
    known = [1, 2, 3]
    for output in outputs:
        logprobs = toy_logits(known).double().log_softmax(dim=0)
        assert output.named == pytest.approx(logprobs[list(_NAMED)].tolist(), abs=1e-6)
        known.append(output.token)
    assert tokens_of(outputs) == toy_generate([1, 2, 3], 3)


class _BrokenModel(ToyModel):
    """Gives no finite logits after token 13."""

    def forward(self, batch: Batch, pool: KVPool) -> torch.Tensor:
        logits = super().forward(batch, pool)
        logits[batch.token_ids[batch.logit_rows] == 13] = float("nan")
        return logits


def test_a_prompt_without_finite_logits_fails_alone() -> None:
    config = EngineConfig(page_size=4, max_total_tokens=256, max_running_requests=4, chunked_prefill_size=64)
    model = _BrokenModel(ToyLimits())
    pool = KVPool(spec=model.kv_spec(4), num_pages=64)
    engine = Engine(model=model, pool=pool, config=config, sampler=Sampler())
    engine.add(Request(key="good", prompt=[1, 2, 3], sampling=greedy(1), scoring=Scoring(1)))
    engine.add(Request(key="bad", prompt=[1, 13, 3], sampling=greedy(1), scoring=Scoring(1)))
    output = step(engine)
    assert [(each.request.key, each.why) for each in output.failed] == [
        ("bad", "the model gave no finite logits within the prompt of this request")
    ]
    assert not output.scores
    scores, tokens = _run(engine)
    assert (list(scores), list(tokens)) == (["good"], ["good"])
    assert_idle(engine)


@pytest.mark.parametrize(("job", "named"), [(Scoring(1, 0, (VOCAB,)), ()), (None, (VOCAB,)), (None, (-1,))])
def test_tokens_outside_the_vocabulary_are_refused(job: Scoring | None, named: tuple[int, ...]) -> None:
    engine, _ = toy_engine()
    sampling = SamplingParams(max_tokens=1, logprobs=0, logprob_tokens=named)
    with pytest.raises(ValueError, match=r"token to tell the logprob of (97|-1)"):
        engine.add(Request(key="r", prompt=[1, 2], sampling=sampling, scoring=job))


def test_a_prompt_that_was_scored_before_is_not_scored_again() -> None:
    with pytest.raises(ValueError, match="scored before"):
        Request(key="r", prompt=[1, 2], sampling=greedy(2), scoring=Scoring(1), logged=[3])


def test_pieces_are_small_and_lose_nothing() -> None:
    scoring = Scoring(3, 20, tuple(range(50)), True)
    rows = 3000
    whole = PositionScores(
        first=3,
        logprobs=[float(row) for row in range(rows)],
        ranks=list(range(rows)),
        top_tokens=list(range(rows * 20)),
        top_logprobs=[0.5 * place for place in range(rows * 20)],
        tokens=[0.25 * place for place in range(rows * 50)],
    )
    pieces = list(whole.pieces(scoring))
    assert max(len(piece.logprobs) for piece in pieces) * 92 <= 1 << 16
    assert _joined(pieces) == whole


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, LoadedModel]:
    folder: Path = tmp_path_factory.mktemp("scored")
    reference = save_random_model(LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True), folder)
    return reference, load_model(folder, dtype="float32", num_threads=1)


@pytest.mark.parametrize("chunk", [16, 48, 512])
def test_scores_are_those_of_transformers(tiny: tuple[torch.nn.Module, LoadedModel], chunk: int) -> None:
    reference, model = tiny
    config = EngineConfig(page_size=8, max_total_tokens=4096, max_running_requests=8, chunked_prefill_size=chunk)
    spec = model.kv_spec(config.page_size)
    engine = Engine(
        model=model, pool=KVPool(spec=spec, num_pages=config.num_pages), config=config, sampler=Sampler(num_threads=1)
    )
    prompts = random_sequences([3, 40, 90, 90], seed=3)
    prompts[3][:70] = prompts[2][:70]  # a shared prefix
    for _ in range(2):
        for index, prompt in enumerate(prompts):
            scoring = Scoring(1 if index < 3 else 60, 5, (4, 9), True)
            engine.add(Request(key=index, prompt=prompt, sampling=greedy(2), scoring=scoring))
        scores, _ = _run(engine)
        for index, prompt in enumerate(prompts):
            scoring = Scoring(1 if index < 3 else 60, 5, (4, 9), True)
            logits = reference_logits(reference, prompt)  # type: ignore[arg-type]
            rows = [logits[position - 1] for position in range(scoring.start, len(prompt))]
            _assert_equal(scores[index], _expected(rows, prompt, scoring), within=2e-5)
        assert_idle(engine)
