"""What chats promise of their calls, compiled as replicas do and walked token by token."""

from __future__ import annotations

import json
from typing import Any

import pytest
from chat_templates import FAMILIES
from tiny_tokenizers import byte_level_backend

from engine.grammar.compiler import GrammarCompiler
from engine.grammar.constraint import Constraint, GrammarMismatch
from protocol.sampling import Grammar
from router.api.chat_grammar import chat_grammar
from router.api.chat_tools import FunctionTool, ToolPlan
from router.api.grammar_reader import GrammarReader
from router.errors import ApiError
from text.message_events import CallArguments, CallStart
from text.reasoning import Thinking
from text.tokenizer import Tokenizer
from text.tools import mistral
from text.tools.families import (
    DEEPSEEK,
    DEEPSEEK_BARE,
    HERMES,
    LLAMA3,
    MISTRAL,
    MISTRAL_NAMED,
    PYTHONIC,
    ToolFamily,
    choose_family,
)
from text.tools.parser import ToolParser

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TIME = FunctionTool(name="get_time", parameters=SCHEMA, strict=True)
FIND = FunctionTool(name="find")
BOTH = (TIME, FIND)
CITY, OTHER = '{"city": "the fox"}', '{"town": 1}'
SPECIAL = [mistral.BEGIN, mistral.ARGS, "<think>", "</think>", *DEEPSEEK.markers]


TYPELESS = {"type": "object", "properties": {"a": {"type": []}}}
PARAMETERS = "tools[1].function.parameters"


def make(*special: str) -> tuple[GrammarCompiler, Tokenizer]:
    backend = byte_level_backend()
    backend.add_special_tokens(list(special))
    tokenizer = Tokenizer(backend, eos_token="<|im_end|>")
    size = tokenizer.vocab_size
    return GrammarCompiler(tokenizer, vocab_size=size, eos_token_ids=tokenizer.eos_token_ids), tokenizer


@pytest.fixture(scope="module", params=[(), tuple(SPECIAL)], ids=["plain", "special"])
def model(request: pytest.FixtureRequest) -> tuple[GrammarCompiler, Tokenizer]:
    """A model whose marks are texts, and one where they are special tokens."""
    return make(*request.param)


class Walk:
    """How far outputs may go under one grammar."""

    def __init__(
        self,
        model: tuple[GrammarCompiler, Tokenizer],
        plan: ToolPlan,
        family: ToolFamily | None,
        *,
        wanted: Grammar | None = None,
        thinking: Thinking | None = None,
    ) -> None:
        compiler, self._tokenizer = model
        named = {self._tokenizer.token_text(token): token for token in self._tokenizer.special_ids}
        self.specials = {name: token for name, token in named.items() if name in SPECIAL}
        grammar = chat_grammar(wanted, plan, family, thinking, self.specials, GrammarReader())
        assert grammar is not None
        self._compiled = compiler.compile(grammar)

    def allows(self, text: str, *, end: bool = True) -> bool:
        """Whether `text` may be the whole output, or its beginning."""
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        (end_id,) = self._tokenizer.eos_token_ids
        try:
            Constraint(self._compiled, [*ids, end_id] if end else ids)
        except GrammarMismatch:
            return False
        return True


def written(family: ToolFamily, *calls: tuple[str, str]) -> str:
    form = family.form
    each = [form.before + name + form.between + arguments + form.after for name, arguments in calls]
    return form.opening + form.separator.join(each) + form.closing


ALL = [HERMES, LLAMA3, PYTHONIC, MISTRAL, MISTRAL_NAMED, DEEPSEEK, DEEPSEEK_BARE]
families = pytest.mark.parametrize("family", ALL, ids=[f"{n}-{family.name}" for n, family in enumerate(ALL)])


@families
def test_required_calls_and_nothing_else(model: tuple[GrammarCompiler, Tokenizer], family: ToolFamily) -> None:
    walk = Walk(model, ToolPlan(BOTH, BOTH, required=True), family)
    two = written(family, ("get_time", CITY), ("find", "{}"))
    assert walk.allows(two)
    assert walk.allows(written(family, ("find", "{}")))
    for text in ("", "the fox", "the fox " + two, two + " the fox", written(family, ("dog", "{}"))):
        assert not walk.allows(text)
    for name, arguments in (("get_time", OTHER), ("get_time", "{}"), ("find", CITY)):
        assert not walk.allows(written(family, (name, arguments)))
    parser = ToolParser(family.read, {"get_time", "find"})
    events = [*parser.feed(two), *parser.finish()]
    assert [event.name for event in events if isinstance(event, CallStart)] == ["get_time", "find"]
    assert "".join(event.text for event in events if isinstance(event, CallArguments)) == CITY + "{}"


@families
def test_one_call_where_only_one_is_wanted(model: tuple[GrammarCompiler, Tokenizer], family: ToolFamily) -> None:
    walk = Walk(model, ToolPlan(BOTH, (FIND,), required=True, parallel=False), family)
    assert walk.allows(written(family, ("find", "{}")))
    assert not walk.allows(written(family, ("find", "{}"), ("find", "{}")))
    assert not walk.allows(written(family, ("get_time", CITY)))
    free = Walk(model, ToolPlan(BOTH, BOTH, parallel=False), family)
    assert free.allows("the fox " + written(family, ("find", OTHER)))
    assert not free.allows("the fox " + written(family, ("find", OTHER), ("find", "{}")))


@families
def test_strict_tools_among_others_in_free_text(model: tuple[GrammarCompiler, Tokenizer], family: ToolFamily) -> None:
    walk = Walk(model, ToolPlan(BOTH, BOTH), family)
    assert walk.allows("the lazy fox")
    assert walk.allows("the fox\n" + written(family, ("get_time", CITY), ("find", OTHER)))
    assert walk.allows(written(family, ("find", OTHER)) + " a dog")
    assert not walk.allows(written(family, ("get_time", OTHER)))
    assert not walk.allows(written(family, ("dog", "{}")))


def test_an_answer_in_its_format_or_calls(model: tuple[GrammarCompiler, Tokenizer]) -> None:
    plan = ToolPlan(BOTH, BOTH)
    wants: list[tuple[Grammar, str]] = [
        (Grammar(kind="json_schema", text=json.dumps(SCHEMA), field="response_format"), CITY),
        (Grammar(kind="json_object", field="response_format"), OTHER),
        (Grammar(kind="regex", text="[a-z]+ fox", field="regex"), "the fox"),
        (Grammar(kind="ebnf", text='root ::= "a fox"', field="ebnf"), "a fox"),
        (Grammar(kind="choice", text='["fox", "dog"]', field="guided_choice"), "dog"),
        (
            Grammar(
                kind="structural_tag",
                text='{"type": "structural_tag", "format": {"type": "const_string", "value": "a dog"}}',
                field="structural_tag",
            ),
            "a dog",
        ),
    ]
    for wanted, answer in wants:
        walk = Walk(model, plan, HERMES, wanted=wanted)
        assert walk.allows(answer)
        assert walk.allows(written(HERMES, ("find", "{}")))
        assert not walk.allows("no")
        thought = Walk(model, ToolPlan(), None, wanted=wanted, thinking=Thinking.FREE)
        assert thought.allows(answer)
        assert thought.allows(f"<think>\nno, the fox\n</think>\n\n{answer}")
        assert not thought.allows("no")


@pytest.mark.parametrize("family", [HERMES, MISTRAL_NAMED])
def test_thinking_comes_before_calls(model: tuple[GrammarCompiler, Tokenizer], family: ToolFamily) -> None:
    plan = ToolPlan(BOTH, BOTH, required=True)
    call = written(family, ("find", "{}"))
    opened = Walk(model, plan, family, thinking=Thinking.OPEN)
    assert opened.allows(f"no, the fox\n</think>\n\n{call}")
    assert not opened.allows(f"no, the fox {call}")
    closed = Walk(model, plan, family, thinking=Thinking.CLOSED)
    assert closed.allows(call)
    assert not closed.allows(f"<think>no</think>{call}")
    free = Walk(model, ToolPlan(BOTH, BOTH), family, thinking=Thinking.FREE)
    assert free.allows(f"<think>no</think>the fox {call}")
    assert free.allows("the fox")


def test_marks_that_are_special_tokens_are_those_tokens() -> None:
    walk = Walk(make(*SPECIAL), ToolPlan(BOTH, BOTH, required=True), MISTRAL)
    assert not walk.allows("[TOOL", end=False)
    assert walk.allows(mistral.BEGIN, end=False)
    assert Walk(make(), ToolPlan(BOTH, BOTH, required=True), MISTRAL).allows("[TOOL", end=False)


def test_a_special_token_is_no_text() -> None:
    compiler, tokenizer = make()
    text = json.dumps("a <|im_start|> b")
    (mark,) = tokenizer.encode("<|im_start|>", add_special_tokens=False)
    for grammar in (Grammar(kind="regex", text=".*"), Grammar(kind="json_schema", text='{"type": "string"}')):
        compiled = compiler.compile(grammar)
        with pytest.raises(GrammarMismatch, match=str(mark)):
            Constraint(compiled, tokenizer.encode(text, add_special_tokens=False))


def test_white_space_has_an_end() -> None:
    walk = Walk(make(), ToolPlan(BOTH, BOTH, required=True), HERMES)
    begin = HERMES.form.before + "find" + HERMES.form.between
    assert walk.allows(begin + "{" + 20 * " ", end=False)
    assert not walk.allows(begin + "{" + 40 * " ", end=False)


def test_no_grammar_where_nothing_is_promised() -> None:
    assert chat_grammar(None, ToolPlan((FIND,), (FIND,)), HERMES, Thinking.FREE, {}, GrammarReader()) is None
    assert chat_grammar(None, ToolPlan(), HERMES, None, {}, GrammarReader()) is None
    wanted = Grammar(kind="regex", text="a", field="regex")
    assert chat_grammar(wanted, ToolPlan(), HERMES, Thinking.CLOSED, {}, GrammarReader()) is wanted


@pytest.mark.parametrize(
    ("wanted", "plan", "param"),
    [
        (Grammar(kind="structural_tag", text='{"structures": []}', field="structural_tag"), BOTH, "structural_tag"),
        (None, (FIND, FunctionTool(name="f", parameters={"description": "x" * 300_000}, strict=True)), PARAMETERS),
        (None, (FIND, FunctionTool(name="f", parameters=TYPELESS, strict=True)), PARAMETERS),
    ],
)
def test_what_cannot_be_promised_is_refused(wanted: Grammar | None, plan: Any, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat_grammar(wanted, ToolPlan(plan, plan), HERMES, None, {}, GrammarReader())
    assert (caught.value.status, caught.value.param) == (400, param)


def test_every_template_s_family_is_covered() -> None:
    assert {choose_family("auto", template) for template in FAMILIES.values()} <= set(ALL)
