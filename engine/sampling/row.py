"""One sequence's sampling: its parameters, and what it must remember from token to token.

A `SampleRow` is made when a request first samples and lives as long as the request; `append` tells it each token
generated. So the counts that penalties need are kept up, never rebuilt, and everything that can be worked out once is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.sampling.bad_words import BadWords
from engine.sampling.noise import position_key, sequence_key
from protocol.sampling import SamplingParams

_GREEDY_BELOW = 1e-5
"""A temperature so low that dividing by it could overflow, and noise could not matter."""
_MOST_BIAS = 1e6
"""Biases end here: even divided by the lowest temperature, float64 can then still add noise to such a logit."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """One sampled token."""

    token: int
    logprob: float | None = None
    """Log-softmax of the raw logits at `token`, when the request asks for logprobs."""
    top: list[tuple[int, float]] | None = None
    """The likeliest tokens and their logprobs, best first, when it asks for more than the sampled one."""
    named: list[float] | None = None
    """The logprobs of `SamplingParams.logprob_tokens`, when there are any."""


class TokenCounts:
    """The distinct tokens of prompt and output, and how often each was generated."""

    def __init__(self, prompt: Sequence[int] | npt.NDArray[np.int64], generated: Sequence[int]) -> None:
        seen, places = np.unique(np.concatenate([np.asarray(prompt), np.asarray(generated)]), return_inverse=True)
        self._size = len(seen)
        self._ids = np.zeros(self._size + 64, np.int64)
        self._ids[: self._size] = seen
        self._counts = np.zeros(self._size + 64, np.float32)
        self._counts[: self._size] = np.bincount(places[len(prompt) :], minlength=self._size)
        self._place = {token: place for place, token in enumerate(seen.tolist())}

    def add(self, token: int) -> None:
        """Count one more generated token."""
        place = self._place.get(token)
        if place is None:
            if self._size == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            place = self._place[token] = self._size
            self._ids[place] = token
            self._size += 1
        self._counts[place] += 1

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """int64 `[distinct]`: every token of prompt or output once."""
        return self._ids[: self._size]

    @property
    def generated(self) -> npt.NDArray[np.float32]:
        """float32 `[distinct]`: how often each of `ids` was generated; 0 for those of the prompt alone."""
        return self._counts[: self._size]


class SampleRow:
    """What the sampler needs to know of one sequence. `position` counts generated tokens, logged ones included."""

    def __init__(
        self,
        *,
        params: SamplingParams,
        prompt: Sequence[int] | npt.NDArray[np.int64],
        generated: Sequence[int] = (),
        choice: int = 0,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self.params = params
        self.position = len(generated)
        self.greedy = params.temperature < _GREEDY_BELOW
        penalised = (
            params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        )
        self.counts = TokenCounts(prompt, generated) if penalised else None
        self.bias_ids = np.fromiter(params.logit_bias.keys(), np.int64, len(params.logit_bias))
        biases = np.fromiter(params.logit_bias.values(), np.float64, len(params.logit_bias))
        self.bias_values = biases.clip(-_MOST_BIAS, _MOST_BIAS).astype(np.float32)
        self.allowed_ids = np.fromiter(params.allowed_token_ids, np.int64, len(params.allowed_token_ids))
        """The only tokens that may come; with none, all may."""
        self._bad_words = BadWords(params.bad_words, generated)
        stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_token_ids))
        self._stop_ids = np.fromiter(sorted(stops), np.int64, len(stops))
        left = set(params.allowed_token_ids).difference(stops, (word[-1] for word in params.bad_words))
        self._may_stop_early = len(self.allowed_ids) > 0 and not left
        self._constrained = params.grammar is not None
        self._unwanted = tuple(eos_token_ids) if params.ignore_eos else ()
        self._sequence_key = sequence_key(params.seed, choice)

    def append(self, token: int) -> None:
        """The sequence has generated `token`; the next sample is for the position after it."""
        self.position += 1
        if self.counts is not None:
            self.counts.add(token)
        self._bad_words.add(token)

    @property
    def banned_ids(self) -> npt.NDArray[np.int64]:
        """What would complete a bad word, and stop tokens while `min_tokens` is not reached, unless only they may come.
        A grammar has `avoided_ids` instead of these."""
        if not self._is_early or self._constrained or self._may_stop_early:
            return self._bad_words.ends
        return np.concatenate([self._stop_ids, self._bad_words.ends]) if len(self._bad_words.ends) else self._stop_ids

    @property
    def avoided_ids(self) -> Sequence[int]:
        """Tokens that may only be sampled where the grammar leaves no other: the end of a grammar goes before
        `min_tokens` and `ignore_eos`."""
        return (*self._unwanted, *self._stop_ids.tolist()) if self._is_early else self._unwanted

    @property
    def _is_early(self) -> bool:
        return self.position < self.params.min_tokens

    @property
    def edits_logits(self) -> bool:
        """Whether penalties, biases or bans change this row's logits now."""
        touched = (self.bias_ids, self.allowed_ids, self.banned_ids)
        return self.counts is not None or any(len(ids) > 0 for ids in touched)

    @property
    def noise_key(self) -> tuple[int, int]:
        """Two 32-bit keys of this position's noise."""
        return position_key(self._sequence_key, self.position)
