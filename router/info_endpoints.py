"""Endpoints that tell what this server is: its version, its model, its settings and its replicas."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from starlette.types import Scope

from router.endpoints import Endpoint
from router.exchange import Exchange
from router.health import member_state
from router.version import VERSION


class Alive(Endpoint):
    """GET /liveness: 200 while this router answers at all, whether or not there are replicas."""

    async def respond(self, exchange: Exchange, scope: Scope) -> None:
        await exchange.answer_json(200, {"status": "alive"})


class Version(Endpoint):
    """GET /version."""

    async def respond(self, exchange: Exchange, scope: Scope) -> None:
        await exchange.answer_json(200, {"version": VERSION})


class ModelInfo(Endpoint):
    """GET /model_info: the served model, in SGLang's words."""

    async def respond(self, exchange: Exchange, scope: Scope) -> None:
        config = self.core.config
        await exchange.answer_json(
            200,
            {
                "model_path": config.model_name,
                "tokenizer_path": config.model_name,
                "is_generation": True,
                "weight_version": "default",
                "preferred_sampling_params": None,
                "has_image_understanding": False,
                "has_audio_understanding": False,
                "context_length": config.context_length,
                "vocab_size": self.core.model.tokenizer.vocab_size,
            },
        )


class ServerInfo(Endpoint):
    """GET /server_info: this router's settings, without secrets, and each replica as this router sees it."""

    async def respond(self, exchange: Exchange, scope: Scope) -> None:
        core = self.core
        states = [member_state(view) for view in core.dispatcher.members.views]
        answer = {
            "version": VERSION,
            "status": "ready" if core.dispatcher.members.is_whole else "not_ready",
            "max_total_num_tokens": sum(view.member.max_total_tokens for view in core.dispatcher.members.views),
            "context_length": core.config.context_length,
            "served_model_name": core.config.model_name,
            "router": _settings(core.config),
            "internal_states": states,
        }
        await exchange.answer_json(200, answer)


def _settings(config: Any) -> dict[str, Any]:
    """A dataclass's fields as JSON; those it keeps out of its own `repr` are secret."""
    found = {}
    for field in dataclasses.fields(config):
        if field.repr:
            value = getattr(config, field.name)
            if dataclasses.is_dataclass(value):
                value = _settings(value)
            found[field.name] = str(value) if isinstance(value, Path) else value
    return found
