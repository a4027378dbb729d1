"""A router as a Serve deployment: the HTTP ingress of the application, around `router.app`'s ASGI application.

Lifecycle: the constructor builds the application and watches the directory, so that the router's table of replicas
follows it. Serve asks for the application once (`__serve_build_asgi_app__`), runs its lifespan, waits for the requests
under way when the router is to go, and then awaits `__del__`. No torch in this process.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette

from cluster.config import ClusterConfig
from cluster.directory_handle import DirectoryHandle
from cluster.ingress import IngressMode, ingress_mode, write_error_page
from cluster.membership import MemberWatcher
from cluster.metrics_export import MetricsExporter, readings_of
from cluster.model_folder import context_length, model_folder, served_name
from cluster.node import node_address
from cluster.router_gossip import RouterGossip
from cluster.serve_logs import log_where_serve_does
from cluster.tls import serve_wants_tls

if TYPE_CHECKING:
    from router.config import RouterConfig

log = logging.getLogger(__name__)

_ROUTER_RESTART_S = 3
"""What it takes Serve, about, to replace a router that died."""


class Router:
    """Serve deployment."""

    def __init__(
        self,
        config: ClusterConfig,
        secret: bytes,
        directory: DeploymentHandle[Any],
        pools: list[DeploymentHandle[Any]],
    ) -> None:
        """`pools` are named here so that Serve deploys them with the application; requests reach them by links."""
        from router.app import build_asgi  # here, because the driver needs none of what it imports

        del pools
        log_where_serve_does()
        router_id = serve.get_replica_context().replica_id.unique_id
        mode = ingress_mode(os.environ)
        log.info("router %s: HTTP enters by %s", router_id, mode.value)
        if mode is IngressMode.HAPROXY and serve_wants_tls():
            raise ValueError(
                "http_options has a certificate, but HTTP enters by HAProxy, which Serve runs without TLS: set "
                "RAY_SERVE_ENABLE_HA_PROXY=0 before Ray starts, or end TLS in front and take the certificate out"
            )
        if mode is IngressMode.HAPROXY:
            write_error_page(os.environ, retry_after_s=_ROUTER_RESTART_S)
        self._app: Starlette = build_asgi(
            router_config(config, secret, listen_host=node_address()), router_id=router_id
        )
        client = DirectoryHandle(directory)
        peering = self._app.state.peering
        self._gossip = RouterGossip(client, report=peering.report, take=peering.take)
        self._gossip.start()
        self._watcher = MemberWatcher(
            client,
            on_members=self._app.state.members.update,
            patience_s=config.membership.timeout_s,
        )
        self._watcher.start()
        metrics = self._app.state.metrics
        self._exporter = MetricsExporter(
            lambda: readings_of(metrics.collect()), labels={"pool": "router", "replica": router_id}
        )
        self._exporter.start()

    def __serve_build_asgi_app__(self) -> Starlette:
        return self._app

    async def __del__(self) -> None:
        if hasattr(self, "_exporter"):
            await self._gossip.stop()
            await self._watcher.stop()
            await self._exporter.stop()


def router_config(config: ClusterConfig, secret: bytes, *, listen_host: str) -> RouterConfig:
    """A router's settings in that cluster, on a node which others reach at `listen_host`."""
    from router.config import RouterConfig

    folder = model_folder(config.model.path)
    pool_tokens = min(pool.max_total_tokens for pool in config.pools.values())
    return RouterConfig(
        model_name=served_name(config.model.path, config.model.served_model_name),
        tokenizer_folder=folder,
        context_length=min(config.model.context_length or context_length(folder), pool_tokens),
        secret=secret,
        chat_template=config.model.chat_template,
        tool_parser=config.router.tool_parser,
        reasoning_parser=config.router.reasoning_parser,
        allow_request_chat_template=config.router.allow_request_chat_template,
        max_concurrent_sequences=config.router.max_concurrent_sequences,
        max_queued_tokens=config.router.max_queued_tokens,
        request_timeout_s=config.router.request_timeout_s,
        max_body_bytes=config.router.max_request_bytes,
        max_logprobs=config.router.max_request_logprobs,
        send_timeout_s=config.router.send_timeout_s,
        max_grammar_bytes=config.grammars.max_kb << 10,
        max_schema_parts=config.grammars.max_schema_parts,
        api_keys_file=config.router.api_keys_file,
        cors_origins=tuple(config.router.cors_origins),
        resume_window_s=config.router.resume_window_s,
        resume_max_bytes=config.router.resume_max_mb << 20,
        listen_host=listen_host,
    )
