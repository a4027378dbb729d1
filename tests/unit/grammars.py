"""Grammars over the toy model's vocabulary: shared by the tests of constrained output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from engine.grammar.compiler import GrammarCompiler
from engine.grammar.constraint import Constraint
from engine.grammar.masks import MaskFiller
from engine.request import Request
from protocol.sampling import Grammar, SamplingParams
from tests.unit.tiny_tokenizers import one_character_each
from tests.unit.toy_model import VOCAB, ToyLimits

TOKENIZER = one_character_each()
END = 0
LIMITS = ToyLimits(eos_token_ids=(END,))
COMPILER = GrammarCompiler(TOKENIZER, vocab_size=VOCAB, eos_token_ids=[END])
RECORD = Grammar(
    kind="json_schema",
    text='{"type":"object","properties":{"a":{"type":"integer"},"b":{"enum":["x","yy"]}},"required":["a","b"]}',
)


def regex(pattern: str) -> Grammar:
    return Grammar(kind="regex", text=pattern, field="regex")


def constrained(
    key: object,
    grammar: Grammar,
    *,
    prompt: Sequence[int] = (5, 6, 7),
    logged: Sequence[int] = (),
    choice: int = 0,
    **more: object,
) -> Request:
    """A request whose output `grammar` constrains; `more` are sampling parameters, `retain` apart."""
    retain = bool(more.pop("retain", False))
    sampling = SamplingParams(grammar=grammar, **{"seed": 1, "max_tokens": 60, **more})  # type: ignore[arg-type]
    constraint = Constraint(COMPILER.compile(grammar), logged)
    return Request(
        key=str(key),
        prompt=list(prompt),
        sampling=sampling,
        logged=logged,
        choice=choice,
        retain=retain,
        constraint=constraint,
    )


def text_of(tokens: Sequence[int]) -> str:
    """What the tokens say, the end left out."""
    return TOKENIZER.decode([token for token in tokens if token != END])


@pytest.fixture
def masks() -> Iterator[MaskFiller]:
    filler = MaskFiller(vocab_size=VOCAB)
    yield filler
    filler.close()
