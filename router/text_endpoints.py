"""Endpoints that need no replica: the model's name, tokenisation and its reverse."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field
from starlette.types import Scope

from router.api.chat_messages import ChatMessage
from router.api.chat_prompt import render_prompt
from router.api.chat_tools import Tools, plan_tools
from router.api.fields import ApiModel, invalid, read_body
from router.api.prompts import Texts, Tokens, read_prompts
from router.endpoints import Endpoint
from router.exchange import Exchange


class TokenizeRequest(ApiModel):
    """A prompt or several, or a conversation, as vLLM has it."""

    in_bulk: ClassVar[frozenset[str]] = frozenset({"prompt"})

    unsupported: ClassVar[dict[str, Sequence[Any]]] = {"mm_processor_kwargs": (), "media_io_kwargs": ()}

    model: str | None = None
    prompt: Texts = None
    messages: list[ChatMessage] = Field(default_factory=list)
    add_special_tokens: bool | None = None
    """True for prompts unless told otherwise; chat templates write the special tokens themselves."""
    return_token_strs: bool = False
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template: str | None = Field(None, min_length=1)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    documents: list[dict[str, Any]] = Field(default_factory=list)
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    tools: Tools = Field(default_factory=list)


class DetokenizeRequest(ApiModel):
    in_bulk: ClassVar[frozenset[str]] = frozenset({"tokens"})

    model: str | None = None
    tokens: Tokens
    skip_special_tokens: bool = True


class Tokenize(Endpoint):
    """POST /tokenize: the tokens of a text, of several, or of a conversation's prompt."""

    async def respond(self, exchange: Exchange, scope: Scope) -> None:
        core, config = self.core, self.core.config
        body = await exchange.body(max_bytes=config.max_body_bytes, timeout_s=config.body_timeout_s)
        request = read_body(TokenizeRequest, body)
        core.model.check_name(request.model)
        tokens = await self._tokens(request)
        single = not isinstance(request.prompt, list)
        counts = [len(ids) for ids in tokens]
        answer: dict[str, Any] = {
            "tokens": tokens[0] if single else tokens,
            "count": counts[0] if single else counts,
            "max_model_len": config.context_length,
        }
        if request.return_token_strs:
            texts = await asyncio.to_thread(self._token_texts, tokens)
            answer["token_strs"] = texts[0] if single else texts
        await exchange.answer_json(200, answer)

    def _token_texts(self, tokens: Sequence[Sequence[int]]) -> list[list[str]]:
        text_of = self.core.model.tokenizer.token_text
        known = {token: text_of(token) for token in set(itertools.chain.from_iterable(tokens))}
        return [[known[token] for token in ids] for ids in tokens]

    async def _tokens(self, request: TokenizeRequest) -> list[list[int]]:
        model = self.core.model
        if (request.prompt is None) == (not request.messages):
            raise invalid("prompt", "give either a prompt or messages, and not both")
        special = request.add_special_tokens
        if request.messages:
            prompt = render_prompt(request, plan_tools(request.tools, None, parallel=True), model)
            return await model.encode([prompt.text], param="messages", add_special_tokens=special is True)
        texts = request.prompt if isinstance(request.prompt, list) else [request.prompt]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise invalid("prompt", "it is no text and no list of texts; give one")
        return await model.encode(texts, param="prompt", add_special_tokens=special is not False)


class Detokenize(Endpoint):
    """POST /detokenize: the text of token ids, or the texts of several lists of them."""

    async def respond(self, exchange: Exchange, scope: Scope) -> None:
        core, config = self.core, self.core.config
        body = await exchange.body(max_bytes=config.max_body_bytes, timeout_s=config.body_timeout_s)
        request = read_body(DetokenizeRequest, body)
        core.model.check_name(request.model)
        given = request.tokens
        if not isinstance(given, list) or any(isinstance(token, str) for token in given):
            raise invalid("tokens", "texts are no token ids; give whole numbers")
        lists = await read_prompts(given, core.model, param="tokens")
        decode = core.model.tokenizer.decode
        skip = request.skip_special_tokens
        texts = await asyncio.to_thread(lambda: [decode(ids, skip_special_tokens=skip) for ids in lists])
        found = texts if isinstance(given[0], list) else texts[0]
        await exchange.answer_json(200, {"text": found, "prompt": found})


class Models(Endpoint):
    """GET /v1/models and /v1/models/{model}: the one model there is, and its context length."""

    async def respond(self, exchange: Exchange, scope: Scope) -> None:
        core, name = self.core, self.core.config.model_name
        card = {
            "id": name,
            "object": "model",
            "created": core.started,
            "owned_by": "pd-serve",
            "root": name,
            "parent": None,
            "max_model_len": core.config.context_length,
            "context_length": core.config.context_length,
        }
        wanted = scope["path_params"].get("model")
        if wanted is None:
            await exchange.answer_json(200, {"object": "list", "data": [card]})
            return
        core.model.check_name(wanted)
        await exchange.answer_json(200, card)
