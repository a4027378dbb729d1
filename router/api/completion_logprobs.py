"""Log-probabilities as OpenAI's text completions have them, and prompts' own as vLLM adds them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from protocol.rooms import TokenEvent
from router.score_log import ScoreLog
from text.tokenizer import Tokenizer

_Described = tuple[int, float | None, list[tuple[int, float]]]
"""(token, its logprob or None where there is none, the likeliest tokens there)."""


class CompletionLogprobs:
    """Writes `logprobs` of one choice, piece by piece: its prompt, if that is echoed, then its tokens."""

    def __init__(self, tokenizer: Tokenizer, *, top: int, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._top = top
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._offset = 0

    def of_prompt(self, prompt: Sequence[int], scores: ScoreLog | None) -> dict[str, Any]:
        """The tokens of the prompt, the first of which has no logprob."""
        described: list[_Described] = [(prompt[0], None, [])]
        if scores is not None:
            described += [(prompt[each.position], each.logprob, each.top[: self._top]) for each in scores]
        return self._described(described)

    def of_output(self, events: Sequence[TokenEvent]) -> dict[str, Any]:
        """Generated tokens."""
        return self._described(
            (each.token, each.logprob, [(top.token, top.logprob) for top in (each.top or ())[: self._top]])
            for each in events
        )

    def _described(self, tokens: Iterable[_Described]) -> dict[str, Any]:
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        text_of = self._tokenizer.token_text
        for token, logprob, top in tokens:
            likeliest: dict[str, float] | None = None
            text = text_of(token)
            if logprob is not None:
                likeliest = {}
                for other, value in [*top, (token, logprob)]:  # the token itself always is among them
                    likeliest.setdefault(text_of(other), value)
            found["tokens"].append(text)
            found["token_logprobs"].append(logprob)
            found["top_logprobs"].append(likeliest)
            found["text_offset"].append(self._offset)
            self._offset += self._characters(token)
        return found

    def _characters(self, token: int) -> int:
        """Characters of the text that begin in this token, which may be a part of one or of several."""
        if token in self._hidden:
            return 0
        return sum(byte & 0xC0 != 0x80 for byte in self._tokenizer.bytes_of(token))


def joined(first: dict[str, Any] | None, second: dict[str, Any]) -> dict[str, Any]:
    """Two pieces of `logprobs` as one."""
    return second if first is None else {name: values + second[name] for name, values in first.items()}


def prompt_logprobs(
    tokenizer: Tokenizer, prompt: Sequence[int], scores: ScoreLog, *, top: int
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: for each position the likeliest tokens and its own, by id; nothing for the first."""
    found: list[dict[str, Any] | None] = [None]
    for each in scores:
        ranked = [(token, logprob, rank) for rank, (token, logprob) in enumerate(each.top[:top], start=1)]
        own = (prompt[each.position], each.logprob, each.rank)
        found.append(
            {
                str(token): {"logprob": logprob, "rank": rank, "decoded_token": tokenizer.token_text(token)}
                for token, logprob, rank in [own, *ranked]
            }
        )
    return found
