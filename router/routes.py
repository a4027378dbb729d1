"""Every operation of the HTTP API, in one table: the application's routes and the OpenAPI document are made from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from starlette.routing import Route

from router.api.chat import ChatRequest, parse_chat
from router.api.completions import CompletionRequest, parse_completion
from router.api.fields import ApiModel
from router.api.native import parse_generate
from router.api.native_fields import GenerateRequest, NativeSampling
from router.control_endpoints import AbortRequest, AbortRequests, FlushCaches
from router.endpoints import Endpoint, RouterCore
from router.generate_endpoint import ComeBack, Generate, Parser
from router.health import Health, HealthGenerate, InternalState
from router.info_endpoints import Alive, ModelInfo, ServerInfo, Version
from router.openapi_endpoint import Document
from router.text_endpoints import Detokenize, DetokenizeRequest, Models, Tokenize, TokenizeRequest

PARSERS: dict[str, Parser] = {
    "/v1/chat/completions": parse_chat,
    "/v1/completions": parse_completion,
    "/generate": parse_generate,
}


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One thing that can be asked for, by one or more paths and methods."""

    paths: tuple[str, ...]
    """In Starlette's words."""
    methods: tuple[str, ...] = ("GET",)
    make: Callable[[RouterCore], Endpoint]
    summary: str
    request: type[ApiModel] | None = None
    """What the JSON body is read into."""
    beside: type[ApiModel] | None = None
    """Whose fields the body may have as well."""
    objects: Mapping[str, type[ApiModel]] = field(default_factory=dict)
    """Fields whose value is such an object, or a list of them, and is read apart from the rest."""
    streams: bool = False
    """With `stream` the answer comes as server-sent events."""
    query: Mapping[str, str] = field(default_factory=dict)
    """Numbers that may be asked for in the query, and what they mean."""


def _generation(path: str, summary: str, request: type[ApiModel], **more: type[ApiModel]) -> Operation:
    objects = {"sampling_params": more["beside"]} if more else {}
    return Operation(
        paths=(path,),
        methods=("POST",),
        make=lambda core: Generate(core, path, PARSERS[path]),
        summary=summary,
        request=request,
        beside=more.get("beside"),
        objects=objects,
        streams=True,
    )


OPERATIONS: tuple[Operation, ...] = (
    _generation("/v1/chat/completions", "OpenAI's chat completions", ChatRequest),
    _generation("/v1/completions", "OpenAI's text completions", CompletionRequest),
    _generation("/generate", "SGLang's native API", GenerateRequest, beside=NativeSampling),
    Operation(
        paths=("/v1/streams/{id}",),
        make=lambda core: ComeBack(core, PARSERS),
        summary="The rest of a stream, after the event that the header Last-Event-ID names",
        streams=True,
    ),
    Operation(paths=("/v1/models",), make=Models, summary="The served model"),
    Operation(paths=("/v1/models/{model:path}",), make=Models, summary="The served model, by its name"),
    Operation(
        paths=("/tokenize", "/v1/tokenize"),
        methods=("POST",),
        make=Tokenize,
        summary="The tokens of texts or of a conversation",
        request=TokenizeRequest,
    ),
    Operation(
        paths=("/detokenize", "/v1/detokenize"),
        methods=("POST",),
        make=Detokenize,
        summary="The text of tokens",
        request=DetokenizeRequest,
    ),
    Operation(
        paths=("/abort_request",),
        methods=("POST",),
        make=AbortRequests,
        summary="End requests, at whichever router they are",
        request=AbortRequest,
    ),
    Operation(
        paths=("/flush_cache",),
        methods=("GET", "POST"),
        make=FlushCaches,
        summary="Drop the cached prefixes of all replicas, if nothing is under way",
        query={"timeout": "Seconds to wait for requests that are under way"},
    ),
    Operation(paths=("/health", "/readiness"), make=Health, summary="Whether requests can be served"),
    Operation(paths=("/ping",), methods=("GET", "POST"), make=Health, summary="Whether requests can be served"),
    Operation(paths=("/health_generate",), make=HealthGenerate, summary="Whether tokens come, by making two"),
    Operation(paths=("/liveness",), make=Alive, summary="Whether this router answers"),
    Operation(paths=("/version",), make=Version, summary="The version of this program"),
    Operation(paths=("/model_info", "/get_model_info"), make=ModelInfo, summary="The served model, in SGLang's words"),
    Operation(
        paths=("/server_info", "/get_server_info"), make=ServerInfo, summary="The settings, and each replica's state"
    ),
    Operation(paths=("/internal/state",), make=InternalState, summary="Members, open sequences and counters"),
    Operation(paths=("/openapi.json",), make=lambda core: Document(core, OPERATIONS), summary="This document"),
)


def routes(core: RouterCore) -> list[Route]:
    """The application's."""
    return [
        Route(path, endpoint, methods=list(operation.methods))
        for operation in OPERATIONS
        for endpoint in [operation.make(core)]
        for path in operation.paths
    ]
