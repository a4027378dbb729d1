"""Grammars in the engine: what is sampled always matches, and is the same whatever happens to the request meanwhile."""

from __future__ import annotations

import json
import re

import pytest
import torch

from engine.engine import Engine
from engine.grammar.constraint import Constraint, GrammarMismatch
from engine.grammar.masks import MaskedRow, MaskFiller
from engine.outputs import TokenOutput
from engine.request import Request, RequestStatus
from engine.sampling import Sampler
from engine.sampling.choose import TorchChooser
from engine.stopping import stop_texts
from protocol.sampling import FinishReason, Grammar, SamplingParams
from tests.unit.engine_driver import assert_idle, run, step, tokens_of
from tests.unit.grammars import COMPILER, END, LIMITS, RECORD, TOKENIZER, constrained, masks, regex, text_of
from tests.unit.toy_model import VOCAB, toy_engine

__all__ = ["masks"]

GRAMMARS = [
    RECORD,
    regex("[a-f]{3,9}-[0-9]{2}"),
    Grammar(kind="ebnf", text='root ::= ("(" root ")")* "x"'),
    Grammar(kind="choice", text='["yes", "no", "a \\"third\\" way"]'),
    Grammar(kind="json_object"),
]


def engine_with(masks: MaskFiller, *, pages: int = 400) -> Engine:
    engine, _ = toy_engine(
        pages=pages,
        limits=LIMITS,
        sampler=Sampler(),
        stop_texts=stop_texts(TOKENIZER),
        masks=masks,
        decode_headroom_tokens=0,
        enable_prefix_cache=False,
    )
    return engine


def alone(masks: MaskFiller, grammar: Grammar, **more: object) -> tuple[list[int], FinishReason | None]:
    engine = engine_with(masks)
    engine.add(constrained("r", grammar, **more))
    outputs = run(engine)["r"]
    assert_idle(engine)
    return tokens_of(outputs), outputs[-1].finish


@pytest.mark.parametrize("seed", range(6))
def test_what_ends_matches(masks: MaskFiller, seed: int) -> None:
    tokens, finish = alone(masks, RECORD, seed=seed, max_tokens=200)
    if finish is FinishReason.STOP_TOKEN:
        assert tokens[-1] == END
        record = json.loads(text_of(tokens))
        assert isinstance(record["a"], int)
        assert record["b"] in ("x", "yy")
    else:
        assert (finish, len(tokens)) == (FinishReason.LENGTH, 200)
    tokens, finish = alone(masks, regex("[a-f]{3,9}-[0-9]{2}"), seed=seed)
    assert finish is FinishReason.STOP_TOKEN
    assert re.fullmatch("[a-f]{3,9}-[0-9]{2}", text_of(tokens))
    assert text_of(alone(masks, GRAMMARS[3], seed=seed)[0]) in json.loads(GRAMMARS[3].text)


@pytest.mark.parametrize("pages", [400, 12])
def test_the_batch_and_preemption_change_nothing(masks: MaskFiller, pages: int) -> None:
    """Free and constrained requests together, with and without enough pages for all of them."""
    engine = engine_with(masks, pages=pages)
    for index, grammar in enumerate(GRAMMARS):
        engine.add(constrained(index, grammar, seed=index, max_tokens=30))
        engine.add(
            Request(key=f"free {index}", prompt=[9, index + 2], sampling=SamplingParams(seed=index, max_tokens=9))
        )
    outputs = run(engine)
    assert (engine.counters.preemptions > 0) == (pages == 12)
    for index, grammar in enumerate(GRAMMARS):
        assert tokens_of(outputs[str(index)]) == alone(masks, grammar, seed=index, max_tokens=30)[0]
    assert_idle(engine)


@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda grammar: grammar.kind)
@pytest.mark.parametrize("cut", [1, 3])
def test_a_sequence_goes_on_elsewhere_within_its_grammar(masks: MaskFiller, grammar: Grammar, cut: int) -> None:
    """Resumed from logged tokens, and handed over after the token that a prefill engine sampled."""
    whole, _ = alone(masks, grammar, seed=4, max_tokens=30)
    cut = min(cut, len(whole) - 1)
    engine = engine_with(masks)
    engine.add(constrained("resumed", grammar, seed=4, max_tokens=30, logged=whole[:cut]))
    assert tokens_of(run(engine)["resumed"]) == whole[cut:]

    peer = engine_with(masks)
    sent = constrained("room", grammar, seed=4, max_tokens=30, logged=whole[: cut - 1], retain=True)
    peer.add(sent)
    token = run(peer)["room"][0].token
    assert token == whole[cut - 1]
    received = constrained("room", grammar, seed=4, max_tokens=30, logged=whole[: cut - 1])
    assert engine.reserve(received)
    engine.pool.data[received.pages] = peer.pool.data[sent.pages]
    engine.admit(received, token)
    assert tokens_of(run(engine)["room"]) == whole[cut:]
    peer.release("room")


def test_tokens_that_cannot_be_are_refused_loudly(masks: MaskFiller) -> None:
    digits = regex("[0-9]+")
    with pytest.raises(GrammarMismatch, match="does not allow the token 40"):
        Constraint(COMPILER.compile(digits), [40])
    engine = engine_with(masks)
    received = constrained("room", digits)
    assert engine.reserve(received)
    with pytest.raises(ValueError, match="does not allow the token 40"):
        engine.admit(received, 40)
    engine.abort("room")

    class Deaf(Sampler):
        """Forgets the masks."""

        def sample(self, logits, rows, masks=None):  # type: ignore[no-untyped-def]
            return super().sample(torch.where(torch.arange(VOCAB) == 40, 1.0, 0.0).expand(len(rows), -1), rows)

    engine, _ = toy_engine(limits=LIMITS, sampler=Deaf(chooser=TorchChooser()), masks=masks)
    engine.add(constrained("r", digits, temperature=0.0))
    output = step(engine)
    assert not output.tokens
    (failed,) = output.failed
    assert failed.request.status is RequestStatus.FINISHED
    assert "does not allow the token 40" in failed.why
    assert failed.by_grammar
    assert_idle(engine)


def test_grammars_need_someone_who_compiled_them_and_someone_who_masks(masks: MaskFiller) -> None:
    bare = Request(key="r", prompt=[5], sampling=SamplingParams(grammar=RECORD))
    with pytest.raises(ValueError, match="nobody compiled"):
        engine_with(masks).add(bare)
    engine, _ = toy_engine(limits=LIMITS, sampler=Sampler())
    with pytest.raises(ValueError, match="nobody compiled"):
        engine.add(constrained("r", RECORD))


def test_the_end_of_a_grammar_goes_before_min_tokens_and_ignore_eos(masks: MaskFiller) -> None:
    tokens, finish = alone(masks, regex("[0-9]{4}"), min_tokens=20, ignore_eos=True)
    assert (len(tokens), tokens[-1], finish) == (5, END, FinishReason.STOP_TOKEN)
    # Where more can follow they hold: no end before ten tokens, and none at all.
    for seed in range(8):
        assert len(alone(masks, regex("[0-9]{1,30}"), seed=seed, min_tokens=10)[0]) >= 10
        tokens, finish = alone(masks, regex("[0-9]{1,30}"), seed=seed, ignore_eos=True)
        assert (len(tokens), finish) == (31, FinishReason.STOP_TOKEN)
    # A stop token that the grammar demands comes, however early.
    seven = TOKENIZER.encode("7")[0]
    tokens, finish = alone(masks, regex("77[0-9]*"), stop_token_ids=(seven,), min_tokens=9)
    assert (tokens, finish) == ([seven], FinishReason.STOP_TOKEN)


HEX = regex("[0-9a-f]{2,40}(-[a-f]+)?")
ALL_AT_ONCE = {"stop": ("5", "c", "ee"), "logprobs": 3, "min_tokens": 9, "seed": 5, "max_tokens": 30}


def described(outputs: list[TokenOutput]) -> list[tuple[int, object, object, object]]:
    return [(one.token, round(one.logprob or 0.0, 5), one.finish, one.matched) for one in outputs]


def test_choices_stops_logprobs_and_min_tokens_together_after_preemption_and_resume(masks: MaskFiller) -> None:
    choices = range(6)
    whole: dict[str, list[TokenOutput]] = {}
    for choice in choices:
        engine = engine_with(masks)
        engine.add(constrained(choice, HEX, choice=choice, **ALL_AT_ONCE))
        whole |= {str(key): outputs for key, outputs in run(engine).items()}
    texts = [text_of(tokens_of(outputs)) for outputs in whole.values()]
    assert len(set(texts)) == len(texts), "choices differ"
    assert {outputs[-1].finish for outputs in whole.values()} >= {FinishReason.STOP_STRING}
    for outputs, text in zip(whole.values(), texts, strict=True):
        assert len(outputs) >= 9
        assert all(one.top is not None and len(one.top) == 3 for one in outputs)
        assert re.match("[0-9a-f]*(-[a-f]*)?$", text), text

    crowded = engine_with(masks, pages=9)
    for choice in choices:
        crowded.add(constrained(choice, HEX, choice=choice, **ALL_AT_ONCE))
    outputs = run(crowded)
    assert crowded.counters.preemptions > 0
    assert {str(key): described(each) for key, each in outputs.items()} == {
        key: described(each) for key, each in whole.items()
    }

    for cut in (1, 5, 8):
        resumed = engine_with(masks)
        for choice in choices:
            logged = tokens_of(whole[str(choice)])[:cut]
            resumed.add(constrained(choice, HEX, choice=choice, logged=logged, **ALL_AT_ONCE))
        for key, each in run(resumed).items():
            assert described(each) == described(whole[str(key)][cut:])


def test_out_of_tokens_is_length(masks: MaskFiller) -> None:
    tokens, finish = alone(masks, regex("[0-9]{50}"), max_tokens=7)
    assert (len(tokens), finish) == (7, FinishReason.LENGTH)
    assert text_of(tokens).isdecimal()


def test_stop_strings_end_a_grammar_before_its_end(masks: MaskFiller) -> None:
    tokens, finish = alone(masks, regex("abcdef"), stop=("cd",))
    assert (text_of(tokens), finish) == ("abcd", FinishReason.STOP_STRING)


def test_log_probabilities_are_of_the_logits_before_the_mask(masks: MaskFiller) -> None:
    engine = engine_with(masks)
    engine.add(constrained("r", regex("[0-9]{5}"), logprobs=VOCAB))
    engine.add(Request(key="free", prompt=[5, 6, 7], sampling=SamplingParams(seed=1, logprobs=VOCAB, max_tokens=1)))
    outputs = run(engine)
    first, free = outputs["r"][0], outputs["free"][0]
    assert first.top is not None
    assert free.top is not None
    assert dict(first.top) == pytest.approx(dict(free.top))
    assert len(first.top) == VOCAB
    assert first.logprob == pytest.approx(dict(first.top)[first.token])


def test_biases_and_penalties_work_within_the_mask(masks: MaskFiller) -> None:
    nine, eight = TOKENIZER.encode("9")[0], TOKENIZER.encode("8")[0]
    forbidden = TOKENIZER.encode("z")[0]
    tokens, _ = alone(masks, regex("[89]{6}"), temperature=0.0, logit_bias={nine: 50.0, forbidden: 100.0})
    assert tokens == [nine] * 6 + [END]
    tokens, _ = alone(masks, regex("[89]{6}"), logit_bias={eight: -100.0})
    assert tokens == [nine] * 6 + [END]


def test_masks_survive_a_batch_that_fails(masks: MaskFiller) -> None:
    engine, model = toy_engine(pages=100, limits=LIMITS, sampler=Sampler(), masks=masks)
    model.fail_at = {2}
    engine.add(constrained("lost", regex("[0-9]{9}")))
    assert not step(engine).failed
    assert [failed.by_grammar for failed in step(engine).failed] == [False]
    engine.add(constrained("next", regex("[a-c]{5}")))
    assert re.fullmatch("[a-c]{5}", text_of(tokens_of(run(engine)["next"])))


def test_a_filler_tells_what_went_wrong(masks: MaskFiller) -> None:
    masks.begin([MaskedRow(0, object())])  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="fill"):
        masks.finish()
    masks.begin([MaskedRow(3, Constraint(COMPILER.compile(regex("a"))))])
    filled = masks.finish()
    assert filled is not None
    assert filled.rows.tolist() == [3]
    allowed = [token for token in range(VOCAB) if int(filled.bits[0, token // 32]) >> token % 32 & 1]
    assert allowed == TOKENIZER.encode("a")
    assert masks.finish() is None


def ends(engine: Engine) -> dict[str, object]:
    """How each request ended: a reason to finish, or why it failed."""
    ended: dict[str, object] = {}
    while engine.has_work():
        output = step(engine)
        ended |= {str(failed.request.key): failed.why for failed in output.failed if failed.by_grammar}
        ended |= {str(token.request.key): token.finish for token in output.tokens if token.finish is not None}
    assert_idle(engine)
    return ended


def test_a_grammar_that_takes_too_long_ends_its_own_request(masks: MaskFiller) -> None:
    """Ambiguous grammars cost more with each token; the streams beside one go on."""
    ambiguous = Grammar(kind="ebnf", text='root ::= s\ns ::= s s s | s s | "a" | ""', field="ebnf")
    engine = engine_with(masks)
    engine.add(constrained("slow", ambiguous, max_tokens=1000, ignore_eos=True, logit_bias={END: -100.0}))
    engine.add(constrained("quick", regex("[a-z]{40}")))
    ended = ends(engine)
    assert ended["quick"] is FinishReason.STOP_TOKEN
    assert "too long" in str(ended["slow"])


def test_a_mask_that_cannot_be_filled_ends_its_own_request(masks: MaskFiller, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = constrained("broken", regex("[a-z]{40}"))
    assert broken.constraint is not None

    class Matcher:
        def fill_next_token_bitmask(self, bits: object, place: int) -> None:
            raise RuntimeError("as made for this test")

    monkeypatch.setattr(broken.constraint, "_matcher", Matcher())
    engine = engine_with(masks)
    engine.add(broken)
    engine.add(constrained("sound", regex("[a-z]{40}")))
    ended = ends(engine)
    assert ended["sound"] is FinishReason.STOP_TOKEN
    assert "as made for this test" in str(ended["broken"])
