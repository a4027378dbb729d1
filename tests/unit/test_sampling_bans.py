"""Tokens that may not come: all but those allowed, and those that would complete a bad word."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from engine_driver import greedy, run, tokens_of
from toy_model import toy_engine, toy_generate

from engine.request import Request
from engine.sampling import Sampler, SampleRow
from engine.sampling.choose import TorchChooser
from protocol.sampling import SamplingParams

VOCAB = 97
SAMPLER = Sampler(chooser=TorchChooser())


def random_logits(rows: int) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(0)) * 3


def row(params: SamplingParams, **options: object) -> SampleRow:
    return SampleRow(params=params, **({"prompt": [1, 2, 3]} | options))  # type: ignore[arg-type]


def plain_bad_ends(words: list[tuple[int, ...]], generated: list[int]) -> set[int]:
    """What vLLM bans: the last token of each word whose other tokens the output ends with."""
    fitting = [word for word in words if len(word) <= len(generated) + 1]
    return {word[-1] for word in fitting if generated[len(generated) + 1 - len(word) :] == list(word[:-1])}


def test_only_allowed_tokens_come_and_as_often_as_they_would_among_themselves() -> None:
    allowed = (5, 40, 96)
    logits = random_logits(1)
    rows = [row(SamplingParams(seed=seed, allowed_token_ids=allowed)) for seed in range(4000)]
    drawn = Counter(each.token for each in SAMPLER.sample(logits.repeat(len(rows), 1), rows))
    assert set(drawn) <= set(allowed)
    wanted = torch.softmax(logits[0, list(allowed)], dim=0).tolist()
    assert [drawn[token] / len(rows) for token in allowed] == pytest.approx(wanted, abs=0.03)


def test_other_rows_and_logprobs_do_not_notice() -> None:
    logits = random_logits(3)
    worst = int(logits[1].argmin())
    rows = [
        row(SamplingParams(temperature=0.0)),
        row(SamplingParams(temperature=0.0, allowed_token_ids=(worst,), logprobs=2, logit_bias={worst: -100.0})),
        row(SamplingParams(temperature=0.0)),
    ]
    best = logits.argmax(dim=1).tolist()
    expected = torch.log_softmax(logits[1], dim=0)
    sampled = SAMPLER.sample(logits.clone(), rows)
    assert [each.token for each in sampled] == [best[0], worst, best[2]]
    assert sampled[1].logprob == pytest.approx(float(expected[worst]), abs=1e-4)
    assert sampled[1].top is not None
    assert sampled[1].top[0][0] == best[1]


@pytest.mark.parametrize(
    ("allowed", "bad", "may_stop"),
    [((7, 8), (), False), ((7,), (), True), ((7, 9), (), True), ((7, 8), ((3, 8),), True), ((), (), False)],
)
def test_a_stop_token_goes_before_min_tokens_where_nothing_else_is_left(
    allowed: tuple[int, ...], bad: tuple[tuple[int, ...], ...], may_stop: bool
) -> None:
    params = SamplingParams(
        temperature=0.0, min_tokens=3, stop_token_ids=(7,), allowed_token_ids=allowed, bad_words=bad
    )
    logits = random_logits(1)
    logits[0, 7] = 100.0
    (sampled,) = SAMPLER.sample(logits, [row(params, eos_token_ids=(9,))])
    assert (sampled.token == 7) == may_stop


def test_bad_words_are_never_completed_wherever_a_sequence_is_begun() -> None:
    words = [(4,), (1, 2), (2, 2, 3), (1, 2, 1, 2), (3, 3)]
    params = SamplingParams(bad_words=tuple(words))
    generated: list[int] = []
    one = row(params)
    for number in range(300):
        expected = plain_bad_ends(words, generated)
        again = row(params, generated=list(generated))
        assert set(one.banned_ids.tolist()) == set(again.banned_ids.tolist()) == expected
        token = next(each for each in (number * number // 3 % 5, 0) if each not in expected)
        generated.append(token)
        one.append(token)
    text = ",".join(map(str, ["", *generated, ""]))
    assert not any(f",{','.join(map(str, word))}," in text for word in words)
    assert len(set(generated)) == 4


def test_the_prompt_is_no_part_of_a_bad_word() -> None:
    params = SamplingParams(bad_words=((3, 5),))
    assert not row(params, prompt=[1, 2, 3]).edits_logits
    assert row(params, prompt=[1], generated=[3]).banned_ids.tolist() == [5]


def test_an_engine_goes_on_after_logged_tokens_as_it_would_have() -> None:
    """Both halves of a request and every epoch of it see the same words."""
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    free = toy_generate(prompt, 12)
    sampling = greedy(12, bad_words=((free[0], free[1]), (free[5],)))
    engine, _ = toy_engine(sampler=SAMPLER)
    engine.add(Request(key="whole", prompt=prompt, sampling=sampling))
    whole = tokens_of(run(engine)["whole"])
    assert whole[0] == free[0]
    assert whole[1] != free[1]
    assert free[5] not in whole
    for logged in (1, 5, 11):
        engine.add(Request(key=logged, prompt=prompt, sampling=sampling, logged=whole[:logged]))
        assert tokens_of(run(engine)[logged]) == whole[logged:]


@pytest.mark.parametrize(
    ("field", "what"), [("allowed_token_ids", "allowed token"), ("bad_words", "token of a bad word")]
)
def test_tokens_that_the_model_does_not_have_are_refused(field: str, what: str) -> None:
    engine, model = toy_engine()
    token = model.config.vocab_size
    named = ((token,),) if field == "bad_words" else (token,)
    with pytest.raises(ValueError, match=f"has the {what} {token}"):
        engine.add(Request(key="r", prompt=[1, 2], sampling=greedy(4, **{field: named})))
