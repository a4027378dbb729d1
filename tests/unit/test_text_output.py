"""Incremental detokenisation and stop strings: no half characters, and always the text of a full decode."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import byte_fallback, byte_level, metaspace

from protocol.sampling import SamplingParams
from text.detokenizer import IncrementalDetokenizer
from text.output_text import OutputText
from text.stop import StopStringMatcher
from text.tokenizer import Tokenizer

BYTE_LEVEL, BYTE_FALLBACK, METASPACE = byte_level(), byte_fallback(), metaspace()
WORDS = st.text(alphabet="abc the grüße 😀👨‍👩‍👧中文\n.<|", max_size=30)


def pieces(tokenizer: Tokenizer, prompt: list[int], ids: list[int], *, skip: bool = True) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip_special_tokens=skip)
    return [*(detokenizer.push(id_) for id_ in ids), detokenizer.flush()]


@given(st.lists(st.integers(0, BYTE_LEVEL.vocab_size - 1), max_size=40), st.booleans())
@settings(max_examples=300, deadline=None)
def test_byte_level_pieces_join_to_the_decode_of_any_tokens(ids: list[int], skip: bool) -> None:
    assert "".join(pieces(BYTE_LEVEL, [], ids, skip=skip)) == BYTE_LEVEL.decode(ids, skip_special_tokens=skip)


@given(WORDS, WORDS)
@settings(max_examples=200, deadline=None)
def test_pieces_after_a_prompt_are_the_rest_of_the_whole(prompt: str, text: str) -> None:
    for tokenizer in (BYTE_LEVEL, BYTE_FALLBACK, METASPACE):
        prompt_ids = tokenizer.encode("the " + prompt)
        ids = tokenizer.encode(text, add_special_tokens=False)
        whole = tokenizer.decode(prompt_ids + ids)
        assert "".join(pieces(tokenizer, prompt_ids, ids)) == whole[len(tokenizer.decode(prompt_ids)) :]


@given(st.text(max_size=20))
@settings(max_examples=200, deadline=None)
def test_no_piece_holds_half_a_character(text: str) -> None:
    text = text.replace("\ufffd", "?")
    for tokenizer in (BYTE_LEVEL, BYTE_FALLBACK):
        prompt = tokenizer.encode("the")
        assert "\ufffd" not in "".join(pieces(tokenizer, prompt, tokenizer.encode(text, add_special_tokens=False)))


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK])
def test_emoji_waits_for_its_last_byte(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🦊", add_special_tokens=False)
    shown = pieces(tokenizer, tokenizer.encode("the"), ids)
    assert len(ids) >= 4
    assert shown[-2:] == ["🦊", ""]
    assert shown[-4:-2] == ["", ""]
    assert pieces(tokenizer, [], ids[:-1])[-1].count("\ufffd") >= 1


def test_prompt_may_end_inside_a_character() -> None:
    ids = BYTE_LEVEL.encode("🦊", add_special_tokens=False)
    assert pieces(BYTE_LEVEL, ids[:1], ids[1:]) == [*[""] * (len(ids) - 2), "🦊", ""]


def test_invalid_bytes_do_not_block_what_follows() -> None:
    byte = BYTE_FALLBACK.encode("é", add_special_tokens=False)[-1]
    ids = [byte] * 12 + BYTE_FALLBACK.encode("the", add_special_tokens=False)
    text = "".join(pieces(BYTE_FALLBACK, [], ids))
    assert text == "\ufffd" * 12 + " the"


def test_window_releases_replacement_characters_that_stay() -> None:
    tokenizer = METASPACE
    unknown = tokenizer.encode("a")
    detokenizer = IncrementalDetokenizer(tokenizer, unknown)
    assert "".join(detokenizer.push(id_) for id_ in unknown * 100) == " a" * 100


@given(
    st.text(alphabet="abc", max_size=14),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 4), min_size=14, max_size=14),
)
@settings(max_examples=500, deadline=None)
def test_stop_matching_does_not_depend_on_the_cuts(text: str, stops: list[str], sizes: list[int]) -> None:
    def run(cuts: list[int]) -> tuple[str, str | None]:
        matcher, shown, rest = StopStringMatcher(stops), "", text
        for size in cuts:
            piece, rest = rest[:size], rest[size:]
            shown += matcher.push(piece)[0]
            assert not any(stop in shown for stop in stops)
        return shown + ("" if matcher.matched else matcher.flush()), matcher.matched

    assert run(sizes) == run([1] * len(text))
    if not any(stop in text for stop in stops):
        assert run(sizes) == (text, None)


def test_stop_over_several_pieces_is_never_shown_in_part() -> None:
    matcher = StopStringMatcher(["</answer>"])
    assert matcher.push("42 </an") == ("42 ", None)
    assert matcher.push("swer") == ("", None)
    assert matcher.push("> and") == ("", "</answer>")
    assert matcher.push("more") == ("", "</answer>")
    assert matcher.flush() == ""


def test_false_alarm_comes_out() -> None:
    matcher = StopStringMatcher(["</answer>"])
    assert matcher.push("a </an")[0] + matcher.push("t>")[0] == "a </ant>"
    assert matcher.push("<")[0] == ""
    assert matcher.flush() == "<"


def test_empty_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="stop string is empty"):
        StopStringMatcher(["a", ""])


def test_output_text_cuts_at_a_stop_that_spans_tokens() -> None:
    ids = BYTE_LEVEL.encode("the fox 🦊 and the dog", add_special_tokens=False)
    output = OutputText(BYTE_LEVEL, [], SamplingParams(stop=("🦊 a",)))
    shown = ""
    for id_ in ids:
        text, matched = output.push(id_)
        shown += text
        if matched:
            break
    assert (shown, matched) == ("the fox ", "🦊 a")


def test_stop_before_min_tokens_is_plain_text() -> None:
    ids = BYTE_LEVEL.encode("fox fox fox", add_special_tokens=False)
    first = BYTE_LEVEL.encode("fox", add_special_tokens=False)
    output = OutputText(BYTE_LEVEL, [], SamplingParams(stop=("fox",), min_tokens=len(first) + 1))
    results = [output.push(id_) for id_ in ids]
    stopped = next(number for number, (_, matched) in enumerate(results) if matched)
    assert stopped >= len(first)
    assert "".join(text for text, _ in results) == "fox "


def test_output_text_flushes_what_it_held() -> None:
    output = OutputText(BYTE_LEVEL, [], SamplingParams(stop=("dogs",)))
    shown = "".join(output.push(id_)[0] for id_ in BYTE_LEVEL.encode("a dog", add_special_tokens=False))
    assert shown == "a "
    assert output.flush() == "dog"


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens_are_text_only_when_asked(skip: bool) -> None:
    (end,) = BYTE_LEVEL.encode("<|im_end|>", add_special_tokens=False)
    output = OutputText(BYTE_LEVEL, [], SamplingParams(stop=("<|im_end|>",), skip_special_tokens=skip))
    assert output.push(end) == (("", None) if skip else ("", "<|im_end|>"))


@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_special_tokens_that_are_shown_all_the_same(make) -> None:
    tokenizer = make()
    shown, *_ = sorted(tokenizer.special_ids)
    other = max(tokenizer.special_ids)
    word = tokenizer.encode("the fox", add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(tokenizer, word, shown_special_ids=(shown,))
    text = "".join(map(detokenizer.push, [*word, shown, other, *word])) + detokenizer.flush()
    assert text.count(tokenizer.token_text(shown)) == 1
    assert tokenizer.token_text(other) not in text
    assert text.count("fox") == 2


@pytest.mark.parametrize("include", [True, False])
def test_the_stop_string_may_be_part_of_the_text(include: bool) -> None:
    output = OutputText(BYTE_LEVEL, [], SamplingParams(stop=("fox",), include_stop=include))
    shown, matched = "", None
    for token in BYTE_LEVEL.encode("a fox jumps", add_special_tokens=False):
        text, matched = output.push(token)
        shown += text
        if matched is not None:
            break
    assert (shown, matched) == ("a fox" if include else "a ", "fox")
