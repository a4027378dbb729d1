"""Tokens that may or may not be generated: vLLM's `allowed_token_ids` and `bad_words`."""

from __future__ import annotations

from collections.abc import Sequence

from protocol.sampling import Grammar, SamplingParams
from router.api.fields import invalid, shown
from text.tokenizer import Tokenizer


def bad_word_ids(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The sequences of tokens that stand for each word: at the beginning of a text, and after a space where that makes
    other tokens, as many. Raises `ApiError` (400) for a word that has no token."""
    found: list[tuple[int, ...]] = []
    for number, word in enumerate(words):
        bare = word.lstrip()
        plain, spaced = (tuple(tokenizer.encode(text, add_special_tokens=False)) for text in (bare, " " + bare))
        if not bare or not plain:
            raise invalid(
                f"bad_words[{number}]", f"{shown(word)} has no token of its own; give a word, or leave it out"
            )
        found.append(plain)
        if len(spaced) == len(plain) and spaced[0] != plain[0]:
            found.append(spaced)
    return tuple(dict.fromkeys(found))


def check_left(allowed: Sequence[int], bad_words: Sequence[Sequence[int]]) -> None:
    """Raises `ApiError` (400) where bad words could leave none of the allowed tokens."""
    if allowed and not set(allowed).difference(word[-1] for word in bad_words):
        message = "each of them ends one of bad_words, so that none could be left; allow others, or leave bad_words out"
        raise invalid("allowed_token_ids", message)


def check_no_grammar(sampling: SamplingParams, grammar: Grammar | None) -> None:
    """Raises `ApiError` (400) where a grammar could come to need a token that may not come."""
    named = "allowed_token_ids" if sampling.allowed_token_ids else "bad_words" if sampling.bad_words else None
    if named is not None and grammar is not None:
        raise invalid(named, f"{grammar.field or 'a grammar'} says already what may come; leave one of the two out")
