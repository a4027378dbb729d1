"""Endpoints that need no replica: the model's name, tokenisation and its reverse."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from starlette.types import Scope

from router.api.fields import ApiModel, invalid, read_body
from router.api.prompts import read_prompts
from router.endpoints import Endpoint
from router.exchange import Exchange


class TokenizeRequest(ApiModel):
    model: str | None = None
    prompt: str | list[str]
    add_special_tokens: bool = True


class DetokenizeRequest(ApiModel):
    model: str | None = None
    tokens: list[Any] = Field(min_length=1)
    """Token ids, or a list of such lists."""
    skip_special_tokens: bool = True


class Tokenize(Endpoint):
    """POST /tokenize: `{"prompt": text or list of texts}` to tokens and their count, as SGLang answers."""

    async def respond(self, exchange: Exchange, scope: Scope) -> None:
        core, config = self.core, self.core.config
        body = await exchange.body(max_bytes=config.max_body_bytes, timeout_s=config.body_timeout_s)
        request = read_body(TokenizeRequest, body)
        core.model.check_name(request.model)
        texts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        tokens = await core.model.encode(texts, param="prompt", add_special_tokens=request.add_special_tokens)
        single = isinstance(request.prompt, str)
        counts = [len(ids) for ids in tokens]
        await exchange.answer_json(
            200,
            {
                "tokens": tokens[0] if single else tokens,
                "count": counts[0] if single else counts,
                "max_model_len": config.context_length,
            },
        )


class Detokenize(Endpoint):
    """POST /detokenize: `{"tokens": ids or list of ids' lists}` to text."""

    async def respond(self, exchange: Exchange, scope: Scope) -> None:
        core, config = self.core, self.core.config
        body = await exchange.body(max_bytes=config.max_body_bytes, timeout_s=config.body_timeout_s)
        request = read_body(DetokenizeRequest, body)
        core.model.check_name(request.model)
        if any(isinstance(token, str) for token in request.tokens):
            raise invalid("tokens", "texts are no token ids; give whole numbers")
        lists = await read_prompts(request.tokens, core.model, param="tokens")
        decode = core.model.tokenizer.decode
        texts = [decode(ids, skip_special_tokens=request.skip_special_tokens) for ids in lists]
        await exchange.answer_json(200, {"text": texts if isinstance(request.tokens[0], list) else texts[0]})


class Models(Endpoint):
    """GET /v1/models and /v1/models/{model}."""

    async def respond(self, exchange: Exchange, scope: Scope) -> None:
        core = self.core
        card = {
            "id": core.config.model_name,
            "object": "model",
            "created": core.started,
            "owned_by": "pd-serve",
            "max_model_len": core.config.context_length,
        }
        wanted = scope["path_params"].get("model")
        if wanted is None:
            await exchange.answer_json(200, {"object": "list", "data": [card]})
            return
        core.model.check_name(wanted)
        await exchange.answer_json(200, card)
