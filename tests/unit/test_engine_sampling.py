"""The engine with the real sampler and real text: seeds, penalties, stop strings, rows without finite logits."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from engine.batch import Batch
from engine.engine import Engine
from engine.kv_spec import KVPool
from engine.request import Request
from engine.sampling import Sampler
from engine.stopping import stop_texts
from protocol.sampling import FinishReason, SamplingParams
from tests.unit.engine_driver import assert_idle, run, step, tokens_of
from tests.unit.tiny_tokenizers import byte_level
from tests.unit.toy_model import VOCAB, ToyLimits, ToyModel, toy_engine, toy_generate

_PARAMS = [
    SamplingParams(seed=1, temperature=1.0, max_tokens=30),
    SamplingParams(seed=2, temperature=1.3, top_k=20, max_tokens=30),
    SamplingParams(seed=3, temperature=0.7, top_p=0.9, repetition_penalty=1.3, max_tokens=30),
    SamplingParams(seed=4, temperature=1.0, presence_penalty=0.5, frequency_penalty=0.7, max_tokens=30),
    SamplingParams(seed=5, temperature=0.0, repetition_penalty=1.5, logit_bias={3: 1.5}, max_tokens=30),
    SamplingParams(seed=6, temperature=1.0, min_p=0.1, min_tokens=12, stop_token_ids=tuple(range(40)), max_tokens=30),
]
_PROMPTS = [[(place * 31 + index) % VOCAB for place in range(3 + 5 * index)] for index in range(len(_PARAMS))]


def _alone(index: int) -> list[int]:
    engine, _ = toy_engine(pages=200, sampler=Sampler())
    engine.add(Request(key="r", prompt=_PROMPTS[index], sampling=_PARAMS[index]))
    return tokens_of(run(engine)["r"])


def test_sampling_does_not_depend_on_the_batch_or_on_preemption() -> None:
    for pages in (200, 24):
        engine, _ = toy_engine(pages=pages, sampler=Sampler(), decode_headroom_tokens=0)
        for index, params in enumerate(_PARAMS):
            engine.add(Request(key=index, prompt=_PROMPTS[index], sampling=params))
        outputs = run(engine)
        for index in range(len(_PARAMS)):
            assert tokens_of(outputs[index]) == _alone(index)
        assert_idle(engine)


@pytest.mark.parametrize("index", range(len(_PARAMS)))
@pytest.mark.parametrize("cut", [1, 7])
def test_a_sequence_goes_on_elsewhere_as_it_would_have_here(index: int, cut: int) -> None:
    whole = _alone(index)
    engine, _ = toy_engine(pages=200, sampler=Sampler())
    engine.add(Request(key="resumed", prompt=_PROMPTS[index], sampling=_PARAMS[index], logged=whole[:cut]))
    assert tokens_of(run(engine)["resumed"]) == whole[cut:]

    peer, _ = toy_engine(pages=200, sampler=Sampler())
    sent = Request(key="room", prompt=_PROMPTS[index], sampling=_PARAMS[index], logged=whole[: cut - 1], retain=True)
    peer.add(sent)
    token = run(peer)["room"][0].token
    assert token == whole[cut - 1]
    engine.flush_cache()
    room = Request(key="room", prompt=_PROMPTS[index], sampling=_PARAMS[index], logged=whole[: cut - 1])
    assert engine.reserve(room)
    for ours, theirs in zip(room.pages, sent.pages, strict=True):
        engine.pool.data[ours] = peer.pool.data[theirs]
    engine.admit(room, token)
    assert tokens_of(run(engine)["room"]) == whole[cut:]


def test_choices_of_one_seed_differ() -> None:
    engine, _ = toy_engine(pages=200, sampler=Sampler())
    for choice in range(2):
        engine.add(Request(key=choice, prompt=[5, 6, 7], sampling=_PARAMS[0], choice=choice))
    outputs = run(engine)
    assert tokens_of(outputs[0]) != tokens_of(outputs[1])


def test_logprobs_come_with_the_tokens() -> None:
    engine, _ = toy_engine(sampler=Sampler())
    engine.add(Request(key="r", prompt=[5, 6], sampling=SamplingParams(temperature=0.0, logprobs=3, max_tokens=2)))
    for output in run(engine)["r"]:
        assert output.top is not None
        assert output.top[0] == (output.token, output.logprob)
        assert len(output.top) == 3


def _stopping_engine(**more: int) -> tuple[Engine, Sequence[str], list[int]]:
    """An engine with text, the texts of the tokens it will generate after [1, 2, 3, 4, 5], and those tokens."""
    tokenizer = byte_level()
    engine, _ = toy_engine(stop_texts=stop_texts(tokenizer), **more)
    tokens = toy_generate([1, 2, 3, 4, 5], 30)
    return engine, [tokenizer.token_text(token) for token in tokens], tokens


def test_a_stop_string_across_tokens_ends_the_sequence() -> None:
    engine, texts, tokens = _stopping_engine()
    stop = texts[6][-1] + texts[7][:1]
    first = next(i for i in range(30) if stop in "".join(texts[: i + 1]))
    params = SamplingParams(temperature=0.0, max_tokens=30, stop=("never there", stop))
    engine.add(Request(key="r", prompt=[1, 2, 3, 4, 5], sampling=params))
    outputs = run(engine)["r"]
    assert tokens_of(outputs) == tokens[: first + 1]
    assert (outputs[-1].finish, outputs[-1].matched) == (FinishReason.STOP_STRING, stop)
    assert_idle(engine)


@pytest.mark.parametrize("pages", [64, 9])
def test_a_stop_string_is_found_across_logged_tokens_and_preemption(pages: int) -> None:
    engine, texts, tokens = _stopping_engine(pages=pages, decode_headroom_tokens=0)
    stop = texts[10][-1] + texts[11][:1]
    first = next(i for i in range(30) if stop in "".join(texts[: i + 1]))
    params = SamplingParams(temperature=0.0, max_tokens=30, stop=(stop,))
    other = Request(key="other", prompt=[9, 8, 7, 6], sampling=SamplingParams(temperature=0.0, max_tokens=25))
    engine.add(other)
    engine.add(Request(key="r", prompt=[1, 2, 3, 4, 5], sampling=params, logged=tokens[:first]))
    engine.add(Request(key="whole", prompt=[1, 2, 3, 4, 5], sampling=params))
    outputs = run(engine)
    assert tokens_of(outputs["r"]) == [tokens[first]]
    assert tokens_of(outputs["whole"]) == tokens[: first + 1]
    assert tokens_of(outputs["other"]) == toy_generate([9, 8, 7, 6], 25)
    assert_idle(engine)


def test_a_stop_string_before_min_tokens_does_not_count() -> None:
    engine, texts, _ = _stopping_engine()
    stop = texts[2]
    params = SamplingParams(temperature=0.0, max_tokens=30, stop=(stop,), min_tokens=8)
    engine.add(Request(key="r", prompt=[1, 2, 3, 4, 5], sampling=params))
    assert len(run(engine)["r"]) >= 8


def test_a_token_without_text_fails_its_request_alone() -> None:
    def no_text(request: Request) -> _Broken:
        return _Broken()

    engine, _ = toy_engine(stop_texts=no_text)
    engine.add(Request(key="bad", prompt=[1, 2], sampling=SamplingParams(temperature=0.0, stop=("x",))))
    engine.add(Request(key="good", prompt=[3, 4], sampling=SamplingParams(temperature=0.0, max_tokens=4)))
    output = step(engine)
    assert [(each.request.key, "no such token" in each.why) for each in output.failed] == [("bad", True)]
    assert len(run(engine)["good"]) == 3
    assert_idle(engine)


class _Broken:
    def push(self, token: int) -> tuple[str, str | None]:
        raise IndexError("no such token")


class _Overflowing(ToyModel):
    """Has no finite logit for a sequence whose newest token is 13."""

    def forward(self, batch: Batch, pool: KVPool) -> torch.Tensor:
        logits = super().forward(batch, pool)
        logits[batch.token_ids[batch.logit_rows] == 13] = float("nan")
        return logits


def test_logits_that_are_not_finite_fail_their_request_alone() -> None:
    engine, _ = toy_engine(sampler=Sampler())
    model = _Overflowing(ToyLimits())
    engine = Engine(model=model, pool=engine.pool, config=engine.config, sampler=Sampler())
    greedy = SamplingParams(temperature=0.0, max_tokens=4, repetition_penalty=1.1)
    engine.add(Request(key="good", prompt=[3, 4], sampling=greedy))
    engine.add(Request(key="bad", prompt=[1, 2, 3, 4, 5, 13], sampling=greedy))
    output = step(engine)
    assert [each.request.key for each in output.failed] == ["bad"]
    assert engine.num_prefix_tokens([1, 2, 3, 4, 5, 13]) == 0, "what such a request computed is not kept"
    alone, _ = toy_engine(sampler=Sampler())
    alone.add(Request(key="good", prompt=[3, 4], sampling=greedy))
    assert tokens_of(run(engine)["good"]) == tokens_of(run(alone)["good"])
    assert_idle(engine)
