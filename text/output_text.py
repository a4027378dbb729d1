"""The text of one generated sequence, cut at its stop string or at what a stop regex matches.

Engine and router both derive a sequence's text through this class, the engine to know when to end it and the router
to send it, so the two always agree on where it ends.
"""

from __future__ import annotations

from collections.abc import Sequence

from protocol.sampling import SamplingParams
from text.detokenizer import IncrementalDetokenizer
from text.stop import StopStringMatcher
from text.stop_regex import StopRegexMatcher
from text.tokenizer import Tokenizer


class OutputText:
    """Push each generated token in order; stop strings and regexes count from the `min_tokens`-th token on."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], sampling: SamplingParams) -> None:
        self._detokenizer = IncrementalDetokenizer(
            tokenizer,
            prompt_ids,
            skip_special_tokens=sampling.skip_special_tokens,
            shown_special_ids=sampling.shown_special_ids,
        )
        self._include_stop = sampling.include_stop
        self._matcher: StopStringMatcher | StopRegexMatcher | None = None
        if sampling.stop_regex:
            self._matcher = StopRegexMatcher(sampling.stop, sampling.stop_regex)
        elif sampling.stop:
            self._matcher = StopStringMatcher(sampling.stop)
        self._unmatched_tokens = max(0, sampling.min_tokens - 1)
        """Tokens whose text passes by the stop strings: with the next one, `min_tokens` are reached."""

    def push(self, token: int) -> tuple[str, str | None]:
        """(the text to show, the stop string or regex that this token completed or None)."""
        text = self._detokenizer.push(token)
        if self._matcher is None:
            return text, None
        if self._unmatched_tokens:
            self._unmatched_tokens -= 1
            self._matcher.skip(text)
            return text, None
        shown, matched = self._matcher.push(text)
        return (shown + self._matcher.ending if matched is not None and self._include_stop else shown), matched

    def flush(self) -> str:
        """What was held back: call once, when the sequence ended for another reason than its text."""
        rest = self._detokenizer.flush()
        if self._matcher is None:
            return rest
        shown, matched = self._matcher.push(rest)
        if matched is not None and self._include_stop:
            shown += self._matcher.ending
        return shown if matched is not None else shown + self._matcher.flush()
