"""Sampling fields that all APIs share, and how they become `SamplingParams`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any

import pydantic
from pydantic import BeforeValidator, Field, WithJsonSchema

from protocol.sampling import SamplingParams
from router.api.fields import Whole, invalid, shown
from router.api.grammar import GrammarFields
from router.api.grammar_reader import GrammarReader
from router.api.token_bans import bad_word_ids, check_left, check_no_grammar
from text.regex_automaton import Automaton
from text.regex_syntax import BadRegex
from text.tokenizer import Tokenizer

_MAX_STOPS = 32
_MAX_STOP_CHARACTERS = 1024
_MAX_BIASED = 1024
_MAX_ALLOWED = 1 << 14
_MAX_BAD_WORDS = 128
_MAX_BAD_CHARACTERS = 256
_MAX_TOKEN_DIGITS = 10
_SEED_MASK = 2**63 - 1


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_STOP = {"type": "string", "minLength": 1, "maxLength": _MAX_STOP_CHARACTERS}
_STOPS = {"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": _MAX_STOPS}]}
StopStrings = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=_MAX_STOP_CHARACTERS)]],
    BeforeValidator(_as_list),
    Field(max_length=_MAX_STOPS),
    WithJsonSchema(_STOPS),
]


class SamplingFields(GrammarFields):
    """How to choose tokens. Names and neutral values are those of OpenAI's API where it has them, else SGLang's."""

    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: Whole = Field(0, ge=-1, le=2**31)
    """0 and -1 keep every token, as does all there are or more."""
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, float] = Field(default_factory=dict, max_length=_MAX_BIASED)
    """Token id (as JSON has no integer keys, in a string) to a bias in [-100, 100]."""
    stop: StopStrings = Field(default_factory=list)
    stop_regex: StopStrings = Field(default_factory=list)
    """As SGLang: what one of them matches ends the text, as a stop string does. In Python's syntax, without what looks
    ahead, behind or back."""
    allowed_token_ids: list[Annotated[Whole, Field(ge=0)]] = Field(
        default_factory=list, min_length=1, max_length=_MAX_ALLOWED
    )
    """As vLLM: no other tokens are generated."""
    bad_words: list[Annotated[str, Field(min_length=1, max_length=_MAX_BAD_CHARACTERS)]] = Field(
        default_factory=list, max_length=_MAX_BAD_WORDS
    )
    """As vLLM: their tokens, at the beginning of a text or after a space, are not generated in this order."""
    stop_token_ids: list[Annotated[Whole, Field(ge=0)]] = Field(default_factory=list, max_length=_MAX_BIASED)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    """As vLLM: the stop string, or stop token, that ends the text is shown."""
    no_stop_trim: bool = False
    """SGLang's name for the same."""
    n: Whole = Field(1, ge=1)

    @pydantic.field_validator("logit_bias")
    @classmethod
    def _biases_are_bounded(cls, value: dict[str, float]) -> dict[str, float]:
        for token, bias in value.items():
            if not (token.isascii() and token.isdecimal() and len(token) <= _MAX_TOKEN_DIGITS):
                raise ValueError(f"{shown(token)} is not a token id; use whole numbers in strings as keys")
            if not -100 <= bias <= 100:
                raise ValueError(f"the bias {bias} of token {token} is not between -100 and 100")
        return value

    def params(
        self,
        *,
        max_tokens: int,
        min_tokens: int,
        names: tuple[str, str],
        seed: int,
        logprobs: int | None,
        tokenizer: Tokenizer,
        reader: GrammarReader,
    ) -> SamplingParams:
        """The engine's parameters; raises `ApiError` (400) for token ids the model does not have, for regexes that
        cannot be followed, and for what does not go together.

        `names` are what the API calls the least and the greatest number of tokens.
        """
        if min_tokens > max_tokens:
            least, greatest = names
            raise invalid(least, f"{min_tokens} is more than {greatest}, which is {max_tokens} here")
        if self.stop_regex:
            try:
                Automaton(self.stop, self.stop_regex)
            except BadRegex as error:
                raise invalid("stop_regex", str(error)) from error
        vocab_size = tokenizer.vocab_size
        bias = {int(token): value for token, value in self.logit_bias.items()}
        for name, tokens in self._named_tokens(bias):
            for token in tokens:
                if token >= vocab_size:
                    raise invalid(name, f"{token} is not a token id; this model's are below {vocab_size}")
        bad_words = bad_word_ids(self.bad_words, tokenizer)
        check_left(self.allowed_token_ids, bad_words)
        found = SamplingParams(
            seed=seed & _SEED_MASK,
            temperature=self.temperature,
            top_k=self.top_k if 0 < self.top_k < vocab_size else 0,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=bias,
            allowed_token_ids=tuple(self.allowed_token_ids),
            bad_words=bad_words,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop=tuple(self.stop),
            stop_regex=tuple(self.stop_regex),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
            include_stop=self.include_stop_str_in_output or self.no_stop_trim,
            logprobs=logprobs,
            grammar=self.grammar(reader),
        )
        check_no_grammar(found, found.grammar)
        return found

    def _named_tokens(self, bias: Mapping[int, float]) -> Iterator[tuple[str, Collection[int]]]:
        yield "logit_bias", bias
        yield "stop_token_ids", self.stop_token_ids
        yield "allowed_token_ids", self.allowed_token_ids
