"""The head process of `cluster.launch`: starts Ray and the application, says when it is ready, ends both in order.

Lifecycle: set the environment that Ray's processes inherit, fetch the model while Ray starts, deploy, wait for the
first healthy answer, print how to use it; then wait for SIGTERM, drain and shut down. What is left over is the
supervisor's business.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import os
import secrets
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType

from cluster.address import is_ipv6, reachable_url
from cluster.config import ClusterConfig
from cluster.config_file import BadConfigFile, ServeApplication
from cluster.ingress import BadEnvFile, haproxy_runs, ingress_mode, own_ports_and_paths, read_env_file
from cluster.late_services import LateServices
from cluster.launch_output import Progress, print_tools, print_usage
from cluster.model_folder import EMBEDDED, NoModel, embedded_model_is_ready, model_folder
from cluster.node_start import noticed_at_once
from cluster.placement import shortfalls
from cluster.readiness import StartFailed, check_port_free
from cluster.serve_start import serve_application
from cluster.tls import BadCertificate
from router.auth_file import read_keys

_PR_SET_PDEATHSIG = 1
_DASHBOARD_TIMEOUT_S = 60.0
_OBJECT_STORE_BYTES = 100 << 20  # KV never goes through Ray


class StopRequested(BaseException):
    """The supervisor asked for an end; raised wherever the main thread is."""


def main() -> int:
    """0 after an orderly end, 1 when the cluster could not start."""
    parser = argparse.ArgumentParser(prog="python -m cluster.head", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--env-file", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for Ray's and HAProxy's sockets and logs")
    parser.add_argument("--host", help="instead of the configuration's")
    parser.add_argument("--port", type=int, help="instead of the configuration's")
    options = parser.parse_args()
    _end_with_parent()
    progress = Progress()
    try:
        application = ServeApplication.read(options.config).at(options.host, options.port)
        check_port_free(application.host, application.port)
        if application.tls is not None:
            application.tls.check()
        _check_model(application.config, progress)
        check_router_files(application.config)
        check_transfer(application.config)
        plain = application.tls is None and not is_ipv6(application.host)
        _set_environment(options.env_file, options.folder, haproxy=plain and haproxy_runs())
        _start(application, options, progress)
        while True:
            signal.pause()
    except (StartFailed, BadConfigFile, BadEnvFile, BadCertificate, NoModel) as error:
        print(f"\ncannot start: {error}", file=sys.stderr)
        return 1
    except StopRequested:
        _shut_down(application.name, progress)
        return 0


def _start(application: ServeApplication, options: argparse.Namespace, progress: Progress) -> None:
    fetching = _fetch_model(application.config, progress)
    if fetching is None:
        model = str(model_folder(application.config.model.path))
        subprocess.Popen([sys.executable, "-m", "cluster.read_ahead", model], stderr=subprocess.DEVNULL)
    progress("starting Ray")
    import ray  # not earlier: Ray reads the environment when it is imported

    importing = threading.Thread(target=importlib.import_module, args=("cluster.app",), daemon=True)
    importing.start()  # Serve, too: a second's work, while Ray's processes come up
    late = LateServices()
    with late.held_back(), noticed_at_once():
        context = ray.init(
            address="local",
            namespace="serve",
            object_store_memory=_OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level="WARNING",
            _temp_dir=str(options.folder),
        )
    signal.signal(signal.SIGTERM, _request_stop)  # until here Ray has a handler of its own, which exits
    if fetching is not None and fetching.wait() != 0:
        raise StartFailed("the embedded model could not be fetched; the reason stands above")
    importing.join()
    _check_placement(application.config)
    progress(f"Ray is up; starting Serve behind {ingress_mode(os.environ).value}")
    url = reachable_url(application.host, application.port, tls=application.tls is not None)
    serve_application(application, url, progress)
    progress("ready")
    late.start(context.dashboard_url)
    print_usage(url)
    dashboard = late.dashboard_url(timeout_s=_DASHBOARD_TIMEOUT_S)
    print_tools(context.address_info["gcs_address"], dashboard, options.folder / "session_latest")


def _set_environment(env_file: Path, folder: Path, *, haproxy: bool) -> None:
    """What Ray's processes inherit: the env file, then this cluster's own ports, paths and token. Set variables win."""
    token = folder / "auth_token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    variables = read_env_file(env_file) | own_ports_and_paths(folder)
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    if not haproxy:
        os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "0"
    # Not a default: a shell in which the env file was sourced has RAY_AUTH_MODE=disabled.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


def _check_model(config: ClusterConfig, progress: Progress) -> None:
    """Find the folder of a model that is somebody's own; a GGUF file is converted now, once."""
    if config.model.path != EMBEDDED:
        progress(f"looking at {config.model.path}")
        model_folder(config.model.path)


def check_router_files(config: ClusterConfig) -> None:
    """Read what the router will read: raises `StartFailed`, before anything starts, for what it could not use."""
    try:
        if config.router.api_keys_file is not None:
            read_keys(Path(config.router.api_keys_file))
        if config.model.chat_template is not None:
            from text.chat_template import ChatTemplate  # only here: it imports jinja2

            ChatTemplate.load(Path(config.model.path), file=config.model.chat_template)
    except ValueError as error:  # BadKeyFile, ChatTemplateError
        raise StartFailed(str(error)) from error


def check_transfer(config: ClusterConfig) -> None:
    """Look for what the replicas need on this machine to exchange pages: raises `StartFailed`, before anything starts,
    for what each of them would refuse, one start after the other."""
    from transfer.cuda.library import check_driver
    from transfer.disk.folders import check_shared
    from transfer.mooncake.library import MooncakeUnavailable, check_devices

    try:
        if config.transfer.folder is not None:
            check_shared(Path(config.transfer.folder))
        if config.transfer.ib_device:
            check_devices(config.transfer.ib_device)
        if config.transfer.transport == "nccl":
            check_driver("nccl", "gloo or auto")
    except (ValueError, MooncakeUnavailable) as error:
        raise StartFailed(str(error)) from error


def _check_placement(config: ClusterConfig) -> None:
    """This machine is all there will be: what does not fit now never will, and Serve would wait for it forever."""
    import ray

    resources = ray.cluster_resources()
    if lines := shortfalls(config.resolve(cluster_cpus=resources.get("CPU", 1.0)), resources):
        remedy = "lower num_cpus (or num_replicas, num_gpus, resources) in the configuration"
        raise StartFailed("\n".join(["this machine has too little for the configured pools", *lines, remedy]))


def _fetch_model(config: ClusterConfig, progress: Progress) -> subprocess.Popen[bytes] | None:
    """Fetch the embedded model in the background, if it is the one that is served and is not there yet."""
    if config.model.path != EMBEDDED or embedded_model_is_ready():
        return None
    progress("fetching the embedded model")
    return subprocess.Popen([sys.executable, "-m", "engine.model.embedded"], stdout=subprocess.DEVNULL)


def _request_stop(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise StopRequested


def _shut_down(name: str, progress: Progress) -> None:
    import ray
    from ray import serve

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    progress("finishing the requests under way (once more to stop at once)")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        with contextlib.suppress(Exception):  # it may not be there yet, or not end in time: the next call ends it
            serve.delete(name)
        progress("shutting down")
        serve.shutdown()  # Ray prints that its controller's end is a failure
        ray.shutdown()


def _end_with_parent() -> None:
    """Where the system can: get SIGTERM when the supervisor dies, so that a killed supervisor leaves nothing."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
