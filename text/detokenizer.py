"""Token ids to text, one at a time, never emitting half a character.

`IncrementalDetokenizer` joins bytes where the tokenizer's tokens have bytes (exact, well under a microsecond a token);
otherwise it decodes a short window of tokens twice and emits the difference, the approach known from text-generation
servers. Output follows a prompt: the prompt's last tokens give the context, so a first token's leading space stays.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from text.tokenizer import Tokenizer

_CONTEXT_TOKENS = 4
"""Tokens before the new ones that can change how they read: a character has at most four bytes."""
_MAX_CONTEXT_TOKENS = 64
_MAX_HELD_TOKENS = 8
"""Tokens that still make no character after this many never will: their replacement characters go out."""
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class IncrementalDetokenizer:
    """The text of one sequence. `push` returns what a token completes; `flush` what is left at the end.

    All pushes and the flush joined are what `Tokenizer.decode` makes of the tokens after the prompt. (One exception:
    in a run of byte-fallback tokens that is not valid UTF-8, only the invalid bytes become U+FFFD, not the whole run,
    since characters already emitted cannot be taken back.)
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        shown_special_ids: Sequence[int] = (),
    ) -> None:
        """`prompt_ids` may be the whole prompt or only its last tokens; `shown_special_ids` are not skipped."""
        tail = prompt_ids[-_CONTEXT_TOKENS:]
        skipped = tokenizer.special_ids.difference(shown_special_ids) if skip_special_tokens else frozenset[int]()
        self._strategy: _Bytes | _Window
        if tokenizer.token_bytes is not None:
            self._strategy = _Bytes(tokenizer, tail, skipped)
        else:
            self._strategy = _Window(tokenizer, tail, skipped)
        self.push = self._strategy.push
        self.flush = self._strategy.flush


class _Bytes:
    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], skipped: frozenset[int]) -> None:
        assert tokenizer.token_bytes is not None
        self._table = tokenizer.token_bytes
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in context:  # so that a character begun by the prompt can be completed
            self.push(token)

    def push(self, token: int) -> str:
        """The text that this token completes, often all of its own, sometimes none."""
        return "" if token in self._skipped else self._decoder.decode(self._table[token])

    def flush(self) -> str:
        """What a cut-off character leaves: U+FFFD, or nothing."""
        return self._decoder.decode(b"", final=True)


class _Window:
    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._ids = [token for token in context if token not in skipped]
        self._held = 0
        self._emitted = self._decode(self._ids)

    def push(self, token: int) -> str:
        """The text that this token completes, often all of its own, sometimes none."""
        if token in self._skipped:
            return ""
        self._ids.append(token)
        self._held += 1
        text = self._decode(self._ids)
        if text.endswith(_REPLACEMENT) and self._held < _MAX_HELD_TOKENS:
            return ""
        new = text[len(self._emitted) :]
        self._held = 0
        self._emitted = text
        self._shorten()
        return new

    def flush(self) -> str:
        """What is still held back."""
        text = self._decode(self._ids)
        new = text[len(self._emitted) :]
        self._emitted = text
        self._held = 0
        return new

    def _shorten(self) -> None:
        if len(self._ids) <= 2 * _CONTEXT_TOKENS:
            return
        shorter = self._ids[-_CONTEXT_TOKENS:]
        text = self._decode(shorter)
        # A window that reads as nothing would let the decoder treat the next token as the start of a text.
        if text or len(self._ids) > _MAX_CONTEXT_TOKENS:
            self._ids, self._emitted = shorter, text

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)
