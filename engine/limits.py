"""What an engine refuses, and how long a sequence may get."""

from __future__ import annotations

import itertools

from engine.request import Request


class RequestTooLong(ValueError):
    """The prompt can never fit this engine, whatever else it holds."""

    def __init__(self, num_tokens: int, max_tokens: int) -> None:
        super().__init__(
            f"the prompt has {num_tokens} tokens, but this model and its KV pool hold prompts of at most "
            f"{max_tokens} tokens and at least one more to generate; shorten the prompt"
        )
        self.num_tokens = num_tokens
        self.max_tokens = max_tokens


def sequence_limit(request: Request, *, max_context: int, has_text: bool) -> int:
    """Tokens the request's sequence may have in all, `max_context` at most.

    Raises `RequestTooLong` when no token more fits the context, ValueError when all were generated before or stop
    strings are asked for without `has_text`.
    """
    if request.num_tokens >= max_context:
        raise RequestTooLong(request.num_tokens, max_context - 1)
    limit = min(request.num_prompt_tokens + request.sampling.max_tokens, max_context)
    if request.num_tokens >= limit:
        raise ValueError(
            f"request {request.key!r} has {request.num_generated} generated tokens already and may have "
            f"{request.sampling.max_tokens} in all; there is nothing left to generate"
        )
    if request.sampling.ends_by_text and not has_text:
        raise ValueError(
            f"request {request.key!r} has stop strings or regexes, but this engine has no tokenizer; use stop_token_ids"
        )
    return limit


def check_vocabulary(request: Request, *, vocab_size: int) -> None:
    """Raises ValueError for a token id that the model has no row for: in the tokens, the biases, the stop tokens, the
    allowed or bad ones, or among those whose log-probabilities are asked for."""
    sampling = request.sampling
    tokens = request.tokens
    named = {"token": (int(tokens.min()), int(tokens.max()))}
    if sampling.logit_bias:
        named["logit_bias token"] = (min(sampling.logit_bias), max(sampling.logit_bias))
    if sampling.stop_token_ids:
        named["stop token"] = (min(sampling.stop_token_ids), max(sampling.stop_token_ids))
    if sampling.allowed_token_ids:
        named["allowed token"] = (min(sampling.allowed_token_ids), max(sampling.allowed_token_ids))
    if bad := list(itertools.chain.from_iterable(sampling.bad_words)):
        named["token of a bad word"] = (min(bad), max(bad))
    described = (*sampling.logprob_tokens, *(request.scoring.tokens if request.scoring is not None else ()))
    if described:
        named["token to tell the logprob of"] = (min(described), max(described))
    for what, (lowest, highest) in named.items():
        wrong = lowest if lowest < 0 else highest
        if not 0 <= wrong < vocab_size:
            raise ValueError(
                f"request {request.key!r} has the {what} {wrong}, but this model's vocabulary has {vocab_size} tokens"
            )
