"""Sampling parameters and finish reasons: what a request asks of the engine and how it ends."""

from __future__ import annotations

import enum
from typing import Literal

import msgspec


class FinishReason(enum.Enum):
    """Why a sequence ended. The router maps these to each API's own words."""

    STOP_TOKEN = "stop_token"
    """End-of-sequence token or one of `stop_token_ids`."""
    STOP_STRING = "stop_string"
    """One of `stop` or `stop_regex` appeared in the text; the text is cut before it."""
    LENGTH = "length"
    """`max_tokens` or the model's context length was reached."""
    ABORT = "abort"
    """Somebody asked the router to end it, and what there was by then is the answer; no replica says so."""


GrammarKind = Literal["json_schema", "json_object", "regex", "ebnf", "structural_tag", "choice"]


class Grammar(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the whole output must match. Replicas compile it; equal kind and text are the same grammar."""

    kind: GrammarKind
    text: str = ""
    """JSON of the schema, of the structural tag or of the list of choices; the regular expression, which matches the
    whole output; the EBNF, whose rule `root` does; nothing for json_object."""
    field: str = ""
    """The request's field it came in, for refusals."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose tokens for one sequence. Ranges are checked by the router; the engine trusts them.

    `seed` is always set: the router draws one when the client gives none, so that any replica can
    continue the sequence. Sampling is `argmax(logits / temperature + Gumbel(seed, choice, position, token))`.
    """

    seed: int = 0
    """Unsigned, below 2**63."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 keeps every token."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] = ()
    """No other tokens are sampled; without any, all may be. A stop token goes before `min_tokens` where no other is
    left."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens, none of which the output may contain: their last is not sampled after those before it."""
    max_tokens: int = 128
    """Generated tokens at most, counted from the end of the prompt (logged tokens included)."""
    min_tokens: int = 0
    """No stop token is sampled, and no stop string matched, before this many generated tokens."""
    stop: tuple[str, ...] = ()
    stop_regex: tuple[str, ...] = ()
    """In Python's syntax, without what `text.regex_syntax` refuses."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    """Special tokens are no text: stop strings do not see them."""
    shown_special_ids: tuple[int, ...] = ()
    """Special tokens that are text all the same: those that calls of tools and reasoning are marked with."""
    include_stop: bool = False
    """Whether the stop string or stop token that ends the text is part of it."""
    grammar: Grammar | None = None
    """Only tokens with which the output can still match are sampled. Once it matches whole, the sequence may end by an
    end-of-sequence token, whatever `ignore_eos` says, and must where nothing else can follow."""
    logprobs: int | None = None
    """None: none. 0: the sampled token's logprob. n: also the n most likely tokens'. Log-softmax of the
    raw logits (before temperature, penalties and filters)."""
    logprob_tokens: tuple[int, ...] = ()
    """With `logprobs`: tokens whose logprobs are wanted in the place of each sampled one."""

    @property
    def ends_by_text(self) -> bool:
        """Whether the text can end the sequence."""
        return bool(self.stop or self.stop_regex)

    @property
    def numbers_per_token(self) -> int:
        """Log-probabilities that come with each generated token."""
        return 0 if self.logprobs is None else 1 + self.logprobs + len(self.logprob_tokens)
