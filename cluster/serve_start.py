"""Serve and the application on it, started side by side and watched until it answers.

Serve's own way is one thing after the other, each looked at once a second: its proxies, then the replicas, then the
application's state. Here replicas load their model while the proxies start, and the application's own health ends the
wait. Needs Ray to be up.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from cluster.config_file import ServeApplication
from cluster.launch_output import Progress
from cluster.readiness import StartFailed, wait_until_healthy

if TYPE_CHECKING:
    from ray.serve.schema import ServeStatus

_SERVE_CONTROLLER = "SERVE_CONTROLLER_ACTOR"


def serve_application(application: ServeApplication, url: str, progress: Progress) -> None:
    """Until it is healthy at `url`. Raises `StartFailed`, with what Serve says of each deployment, if it never is."""
    from ray import serve

    try:
        tls = {} if application.tls is None else application.tls.http_options()
        http = {"host": application.host, "port": application.port, **tls}
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="serve") as pool:
            proxies = pool.submit(serve.start, http_options=http)
            _wait_for_controller(proxies)
            if proxies.done():
                proxies.result()  # Serve did not start: running the application would start it in its own way
            progress("starting the replicas, which load the model")
            _deploy(application)
            wait_for_proxies(proxies, progress)
            wait_until_healthy(url, is_starting=lambda: is_deploying(serve.status(), application.name))
    except RuntimeError as error:
        raise StartFailed("\n".join([str(error), *_complaints(serve.status())])) from error


def _deploy(application: ServeApplication) -> None:
    """Hand it to Serve, without Serve's own wait, which looks at it once a second."""
    from ray import serve

    from cluster.app import build_app

    target = serve.RunTarget(
        build_app(application.config), name=application.name, route_prefix=application.route_prefix
    )
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def is_deploying(status: ServeStatus, name: str) -> bool:
    """Whether Serve still starts it. Raises `RuntimeError` when Serve has given the application up."""
    application = status.applications.get(name)
    if application is None:
        return True
    if application.status == "DEPLOY_FAILED":
        raise RuntimeError(f"Serve could not deploy {name}: {application.message}")
    return bool(application.status == "DEPLOYING")


def _wait_for_controller(starting: Future[None]) -> None:
    """Until Serve takes applications. Its proxies are not there by then, but replicas can load a model meanwhile."""
    import ray

    while not starting.done():
        with contextlib.suppress(ValueError):
            ray.get_actor(_SERVE_CONTROLLER, namespace="serve")
            return
        time.sleep(0.05)


def wait_for_proxies(starting: Future[None], progress: Progress) -> None:
    """Until Serve's own start is over. On a busy machine it gives up on proxies that its controller replaces or that
    take longer: whether HTTP comes in is then for the health check to say."""
    from ray.exceptions import RayActorError

    try:
        starting.result()
    except (RayActorError, TimeoutError) as error:
        progress(f"Serve's proxies are late, waiting for them: {str(error).splitlines()[0]}")


def _complaints(status: ServeStatus) -> list[str]:
    """What deployments that are not healthy say of themselves."""
    return [
        f"{name}: {without_stacks(deployment.message)}"
        for application in status.applications.values()
        for name, deployment in application.deployments.items()
        if deployment.message
    ]


def without_stacks(message: str) -> str:
    """What Serve says first, and the exception that it tells of last. The stacks between are in the logs, twice, and
    nobody would find the words among them."""
    lines = message.splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith("  File ")]
    if not frames:
        return message
    after = itertools.dropwhile(lambda line: line.startswith("    "), lines[frames[-1] + 1 :])
    return "\n".join([lines[0], *after])
