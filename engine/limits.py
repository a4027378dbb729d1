"""What an engine refuses, and how long a sequence may get."""

from __future__ import annotations

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
    if request.sampling.stop and not has_text:
        raise ValueError(
            f"request {request.key!r} has stop strings, but this engine has no tokenizer; use stop_token_ids"
        )
    return limit
