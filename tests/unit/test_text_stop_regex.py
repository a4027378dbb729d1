"""Stop regexes: they match what `re` says, however the text is cut; what has no automaton is refused by name."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import byte_level

from protocol.sampling import SamplingParams
from text.output_text import OutputText
from text.regex_syntax import BadRegex
from text.stop import StopStringMatcher
from text.stop_regex import StopRegexMatcher

TOKENIZER = byte_level()


def expressions() -> st.SearchStrategy[str]:
    """Expressions over a, b and newlines, most of which match something short."""
    ones = st.sampled_from(
        ["a", "b", ".", r"\n", "[ab]", "[^a]", r"\w", r"\s", "(?i:A)", "(?s:.)", "^", "(?m:^)", r"\A"]
    )

    def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        grouped = inner.map("(?:{})".format)
        counts = st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{,2}", "{1,}", "*?", "+?"])
        return st.one_of(
            st.lists(grouped, min_size=1, max_size=3).map("".join),
            st.lists(inner, min_size=2, max_size=3).map("|".join),
            st.builds("{}{}".format, grouped, counts),
        )

    return st.recursive(ones, larger, max_leaves=5)


def reference(text: str, stops: list[str], regexes: list[str]) -> tuple[str, str | None]:
    """The text before the match that ends first, and what matches there: the longest, and of equals the first."""
    names = [*stops, *regexes]
    compiled = [re.compile(each) for each in [*map(re.escape, stops), *regexes]]
    for end in range(1, len(text) + 1):
        for begin in range(end):
            for name, regex in zip(names, compiled, strict=True):
                if regex.fullmatch(text, begin, end):
                    return text[:begin], name
    return text, None


def outcome(text: str, sizes: list[int], stops: list[str], regexes: list[str]) -> tuple[str, str | None]:
    matcher, shown, rest = StopRegexMatcher(stops, regexes), "", text
    final = reference(text, stops, regexes)[0]
    for size in sizes:
        piece, rest = rest[:size], rest[size:]
        shown += matcher.push(piece)[0]
        assert final.startswith(shown), "nothing of a match is ever shown"
    return shown + ("" if matcher.matched else matcher.flush()), matcher.matched


@given(
    st.text(alphabet="aAb\n", max_size=10),
    st.lists(st.text(alphabet="ab\n", min_size=1, max_size=3), max_size=2),
    st.lists(expressions(), min_size=1, max_size=2),
    st.lists(st.integers(1, 4), min_size=10, max_size=10),
)
@settings(max_examples=600, deadline=None)
def test_the_first_match_is_found_however_the_text_is_cut(
    text: str, stops: list[str], regexes: list[str], sizes: list[int]
) -> None:
    try:
        StopRegexMatcher(stops, regexes)
    except BadRegex:  # they match the empty text
        regexes = [f"(?:{each})a" for each in regexes]
    assert outcome(text, sizes, stops, regexes) == reference(text, stops, regexes)
    assert outcome(text, [1] * len(text), stops, regexes) == reference(text, stops, regexes)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="abc", max_size=14), st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3))
def test_stop_strings_beside_regexes_end_the_text_as_they_do_alone(text: str, stops: list[str]) -> None:
    alone, beside = StopStringMatcher(stops), StopRegexMatcher(stops, ["never"])
    assert (alone.push(text)[0] + alone.flush(), alone.matched) == (
        beside.push(text)[0] + beside.flush(),
        beside.matched,
    )


def test_only_what_a_match_may_have_begun_with_is_held_back() -> None:
    matcher = StopRegexMatcher([], [r"\d+ (euros|dollars)"])
    assert matcher.push("for 4") == ("for ", None)
    assert matcher.push("2 eggs, ") == ("42 eggs, ", None)
    assert matcher.push("7") == ("", None)
    assert matcher.push(" euro") == ("", None)
    assert matcher.push("s each") == ("", r"\d+ (euros|dollars)")
    assert matcher.ending == "7 euros"
    assert matcher.push("more") == ("", r"\d+ (euros|dollars)")


@pytest.mark.parametrize("include", [True, False])
def test_output_text_shows_what_matched_only_if_asked(include: bool) -> None:
    output = OutputText(TOKENIZER, [], SamplingParams(stop_regex=(r"[0-9]{2}",), include_stop=include))
    shown = ""
    for id_ in TOKENIZER.encode("the fox 42 dogs", add_special_tokens=False):
        text, matched = output.push(id_)
        shown += text
        if matched:
            break
    assert (shown, matched) == ("the fox 42" if include else "the fox ", "[0-9]{2}")


def test_what_comes_before_min_tokens_is_no_beginning_of_the_text() -> None:
    ids = TOKENIZER.encode("fox\nfox", add_special_tokens=False)
    first = len(TOKENIZER.encode("fox", add_special_tokens=False))
    for regex, matched in (("^fox", None), ("(?m)^fox", "(?m)^fox")):
        output = OutputText(TOKENIZER, [], SamplingParams(stop_regex=(regex,), min_tokens=first + 1))
        assert [output.push(id_)[1] for id_ in ids][-1] == matched


@pytest.mark.parametrize(
    ("regex", "why"),
    [
        ("(", "is no regular expression: missing )"),
        ("a{99999999999999999999}", "is no regular expression"),
        ("a*", "matches the empty text"),
        ("^", "matches the empty text"),
        ("(?m)^", "matches the empty text"),
        ("a$", "has '$' at position 1, which asks what follows"),
        (r"a\b", r"'\\b' at position 1, which asks what follows"),
        (r"a\Z", "which asks what follows"),
        ("a(?=b)", "looks ahead"),
        ("(?!b)a", "looks ahead"),
        ("(?<=b)a", "looks behind"),
        ("(?<!b)a", "looks behind"),
        (r"(a)\1", "refers back"),
        ("(?P<x>a)(?P=x)", "refers back"),
        ("(?>a+)b", "is an atomic group"),
        ("a++b", "'++' at position 1, which is possessive"),
        ("(a)?(?(1)b|c)", "is a condition"),
        ("(?#note)a", "is a comment"),
        ("(?x)a b", "'x' at position 0, which is a flag that is not known here"),
        ("a{600}", "more than 256 parts"),
        ("((a{30}){30}){30}", "more than 256 parts"),
        ("((){1000}){1000}a", "more than 256 parts"),
        ("(" * 60 + "a" + ")" * 60, "more than 50 groups within each other"),
        ("(" * 50_000 + "a" + ")" * 50_000, "is no regular expression"),
    ],
)
def test_what_has_no_automaton_is_refused(regex: str, why: str) -> None:
    with pytest.raises(BadRegex) as caught:
        StopRegexMatcher([], [regex])
    assert why in str(caught.value)


@pytest.mark.parametrize(
    ("regex", "text", "found"),
    [
        (r"\x41\u00e9\n", "xAé\n", "Aé\n"),
        (r"[]\]x]+!", "a]]x!", "]]x!"),
        (r"[^]a]{2}", "a]bc", "bc"),
        (r"a{x", "aa{x", "a{x"),
        (r"a{}", "a{}", "a{}"),
        (r"(?P<word>\w+)\.", "so it ends.", "ends."),
        (r"(?i)STOP", "please StOp", "StOp"),
        (r"\101\0", "A\0", "A\0"),
        (r"\.\|\(", "a.|(", ".|("),
        (r"é{2}|ß", "Grüße", "ß"),
    ],
)
def test_syntax_is_that_of_python(regex: str, text: str, found: str) -> None:
    matcher = StopRegexMatcher([], [regex])
    shown, matched = matcher.push(text)
    assert (shown, matched, matcher.ending) == (text[: text.index(found)], regex, found)


def test_many_different_states_are_not_all_remembered() -> None:
    regex = "[ab]*a" + "[ab]" * 14 + "!"
    matcher = StopRegexMatcher([], [regex])
    text = "".join(random.Random(1).choices("ab", k=10_000))
    for place in range(0, len(text), 50):
        assert matcher.push(text[place : place + 50])[1] is None
    assert matcher.push(text[:9] + "a" + text[:14] + "!") == ("", regex)
    assert 0 < len(matcher._known) <= 256
