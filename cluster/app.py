"""The Serve application: `import_path: cluster.app:build_app` in deploy/config.yaml.

`build_app` composes the deployments of one cluster from its configuration: routers (the HTTP ingress), one pool of
replicas per role, and the directory through which they find each other.

Annotations are not deferred in this file: Serve reads `build_app`'s to know what `args` are.
"""

import logging
import os
import secrets

import ray
from ray import serve
from ray.serve import Application, Deployment

from cluster.config import ClusterConfig
from cluster.config_sections import ReplicaSection
from cluster.directory import Directory
from cluster.ingress import ingress_mode
from cluster.placement import shortfalls
from cluster.replica import Replica
from cluster.router import Router
from protocol.membership import ReplicaRole

log = logging.getLogger(__name__)

SECRET_VARIABLE = "PD_CLUSTER_SECRET"
_MANY_REQUESTS = 100_000  # the router has limits of its own, and answers in the API's words


def build_app(args: ClusterConfig) -> Application:
    """The application of one cluster, every `auto` resolved."""
    config = args.resolve(cluster_cpus=_cluster_cpus())
    log.info("configuration: %s", config.model_dump_json(exclude={"secret"}))
    if ray.is_initialized():
        for shortfall in shortfalls(config, ray.cluster_resources()):
            log.warning("replicas will wait until nodes with more resources join: %s", shortfall)
    log.info("HTTP enters by %s", ingress_mode(os.environ).value)
    secret = _cluster_secret(config)
    config = config.model_copy(update={"secret": None})
    directory = _directory().bind(config.membership.timeout_s)
    pools = [
        _pool(name, section).bind(config, ReplicaRole(name), secret, directory)
        for name, section in config.pools.items()
    ]
    return _router(config).bind(config, secret, directory, pools)


def _router(config: ClusterConfig) -> Deployment:
    return serve.deployment(
        serve.ingress()(Router),
        name="Router",
        num_replicas=config.router.num_replicas,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_MANY_REQUESTS,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=config.router.graceful_shutdown_timeout_s,
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
    )


def _directory() -> Deployment:
    return serve.deployment(
        Directory,
        name="Directory",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_MANY_REQUESTS,
        logging_config={"enable_access_log": False},
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=1.0,
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
    )


def _pool(name: str, section: ReplicaSection) -> Deployment:
    return serve.deployment(
        Replica,
        name=name.capitalize(),
        num_replicas=section.num_replicas,
        ray_actor_options={
            "num_cpus": section.num_cpus,
            "num_gpus": section.num_gpus,
            "resources": section.resources,
        },
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=section.graceful_shutdown_timeout_s,
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
    )


def _cluster_secret(config: ClusterConfig) -> bytes:
    """The configured secret, the environment's, or a new one. Never logged."""
    if config.secret is not None:
        return config.secret.get_secret_value().encode()
    return os.environ.get(SECRET_VARIABLE, "").encode() or secrets.token_bytes(32)


def _cluster_cpus() -> float:
    """Cores of all nodes where Ray runs already, of this machine otherwise (`serve build`)."""
    if ray.is_initialized():
        return float(ray.cluster_resources().get("CPU", 1.0))
    return float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(os.cpu_count() or 1)
