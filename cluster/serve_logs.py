"""Puts what our packages log where Serve puts its own: into each deployment's file, which the dashboard shows."""

from __future__ import annotations

import logging

_PACKAGES = ("protocol", "text", "native", "engine", "transfer", "prefill", "decode", "router", "cluster")
_SERVE = "ray.serve"


def log_where_serve_does() -> None:
    """Call once in each process of a deployment; Serve has set its own logger up by then."""
    serve = logging.getLogger(_SERVE)
    for package in _PACKAGES:
        logger = logging.getLogger(package)
        logger.handlers = serve.handlers
        logger.setLevel(serve.getEffectiveLevel())
        logger.propagate = False
