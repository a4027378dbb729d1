"""From a prompt as clients give it to token ids that fit the model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import WithJsonSchema

from router.api.chat_model import ChatModel
from router.api.fields import invalid, shown
from router.api.grammar_reader import GrammarReader
from router.config import RouterConfig
from router.errors import ApiError
from router.stamp import Stamp
from text.tokenizer import Tokenizer

_MOST_TOKENS = 1 << 22
"""Of one request's texts: their ids alone take 150 MB."""


@dataclass(frozen=True, kw_only=True)
class ModelText:
    """What the router knows of the served model: its name and limits, its tokenizer and its chat template.

    A parser gets one with its request's stamp.
    """

    config: RouterConfig
    tokenizer: Tokenizer
    chat: ChatModel | None
    """How it chats; None where it has no chat template."""
    fingerprint: str
    """Of the model and its configuration, for clients that compare answers."""
    stamp: Stamp
    """Of the request that is parsed; the router's own outside of one."""

    @property
    def grammars(self) -> GrammarReader:
        """How the grammars of requests are read."""
        return GrammarReader.of(self.config)

    def check_name(self, model: str | None) -> None:
        """Raises `ApiError` (404) for another model than the one served."""
        if model is not None and model != self.config.model_name:
            message = f"the model {shown(model)} does not exist here; this server has {self.config.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def encode(self, texts: Sequence[str], *, param: str, add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each prompt; long ones are tokenised in a thread.

        Raises `ApiError` (400) for too many prompts, for one that is empty, or longer than the context whatever its
        tokens are.
        """
        self.check_number(texts, param=param)
        for text in texts:
            if not text:
                raise invalid(param, "the prompt is empty; give at least one character")
            at_least = len(text) // self.tokenizer.longest_token
            if at_least > self.config.context_length:
                raise self._too_long(param, f"the prompt has at least {at_least} tokens; shorten it")

        def encode_all() -> list[list[int]]:
            found: list[list[int]] = []
            left = _MOST_TOKENS
            for text in texts:
                found.append(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))
                left -= len(found[-1])
                if left < 0:
                    raise invalid(param, f"it has more than {_MOST_TOKENS} tokens; send less at a time")
            return found

        if sum(map(len, texts)) <= self.config.thread_characters:
            return encode_all()
        return await asyncio.to_thread(encode_all)

    def check_number(self, prompts: Sequence[object], *, param: str) -> None:
        """Raises `ApiError` (400) for more prompts than one request may have."""
        if len(prompts) > (most := self.config.max_sequences_per_request):
            raise invalid(param, f"{len(prompts)} prompts are over the limit of {most} a request; send fewer at a time")

    def check_ids(self, ids: Sequence[int], *, param: str) -> list[int]:
        """Token ids that a client gave; raises `ApiError` (400) for none at all and for ids out of range."""
        if not ids:
            raise invalid(param, "the prompt is empty; give at least one token id")
        below = self.tokenizer.vocab_size
        if min(ids) < 0 or max(ids) >= below:  # there can be millions: look for the wrong one only where there is one
            position, token = next((place, each) for place, each in enumerate(ids) if not 0 <= each < below)
            raise invalid(param, f"{token} at position {position} is not a token id; this model's are below {below}")
        return list(ids)

    def output_room(self, prompt_tokens: int, wanted: int | None, *, param: str, limit_name: str, default: int) -> int:
        """How many tokens may be generated: `wanted`, else `default` or what the context leaves, whichever is less.

        Raises `ApiError` (400) naming both lengths when prompt and output do not fit the context.
        """
        left = self.config.context_length - prompt_tokens
        if left < 1:
            raise self._too_long(
                param, f"the prompt has {prompt_tokens} tokens, which leaves none for the output; shorten it"
            )
        if wanted is None:
            return min(default, left)
        if wanted > left:
            total = prompt_tokens + wanted
            detail = f"the prompt has {prompt_tokens} tokens and {limit_name} asks for {wanted} more, {total} in all"
            raise self._too_long(limit_name, f"{detail}; shorten the prompt or lower {limit_name}")
        return wanted

    def _too_long(self, param: str, detail: str) -> ApiError:
        message = f"this model's context length is {self.config.context_length} tokens, but {detail}"
        return ApiError(400, message, param=param, code="context_length_exceeded")


_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXT = {"type": "string", "minLength": 1}
TEXTS = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "minItems": 1}]}
TOKENS = {"anyOf": [_IDS, {"type": "array", "items": _IDS, "minItems": 1}]}

Texts = Annotated[Any, WithJsonSchema(TEXTS)]
"""A text or several; for `read_prompts`."""
Tokens = Annotated[Any, WithJsonSchema(TOKENS)]
"""Token ids, or several lists of them; for `read_prompts`."""
Prompts = Annotated[Any, WithJsonSchema({"anyOf": [*TEXTS["anyOf"], *TOKENS["anyOf"]]})]
"""Either; for `read_prompts`."""


async def read_prompts(
    prompt: Any, model: ModelText, *, param: str, add_special_tokens: bool = True
) -> list[list[int]]:
    """The token ids of each prompt in a text, a list of texts, token ids, or a list of token ids' lists."""
    if isinstance(prompt, str):
        return await model.encode([prompt], param=param, add_special_tokens=add_special_tokens)
    if isinstance(prompt, list) and prompt:
        if _are_ids(prompt):
            return [model.check_ids(prompt, param=param)]
        model.check_number(prompt, param=param)
        if all(isinstance(text, str) for text in prompt):
            return await model.encode(prompt, param=param, add_special_tokens=add_special_tokens)
        if all(isinstance(ids, list) and _are_ids(ids) for ids in prompt):
            return [model.check_ids(ids, param=f"{param}[{number}]") for number, ids in enumerate(prompt)]
    raise invalid(param, f"{shown(prompt)} is no prompt; give a text, token ids, or a non-empty list of one of these")


def _are_ids(value: list[Any]) -> bool:
    """Whether all are whole numbers."""
    return set(map(type, value)) <= {int}
