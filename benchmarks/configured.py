"""Clusters of ours in several configurations, each derived from one Serve configuration file."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks.systems import System, add_start_options

START = f"{sys.executable} -m cluster.launch --config {{config}} --port {{port}}"


def add_configured_options(parser: argparse.ArgumentParser) -> None:
    """Give a command line the options that `configured_systems` takes."""
    parser.add_argument("--config", type=Path, required=True, help="Serve configuration that the systems are made from")
    parser.add_argument("--start", default=START, help="command that serves {config} on {port} until interrupted")
    parser.add_argument("--port", type=int, default=8000, help="of the first system; the next has the next, and so on")
    add_start_options(parser)


def configured_systems(settings: Mapping[str, Mapping[str, Any]], arguments: argparse.Namespace) -> list[System]:
    """One system for each name, its settings laid over `--config`; writes the configurations beside the logs."""
    base = yaml.safe_load(arguments.config.read_text())
    arguments.logs.mkdir(parents=True, exist_ok=True)
    systems = []
    for port, (name, own) in enumerate(settings.items(), start=arguments.port):
        path = arguments.logs / f"{name.replace(' ', '-')}.yaml"
        path.write_text(yaml.safe_dump(derive(base, own)))
        command = arguments.start.format(config=path, port=port)
        systems.append(System(name=name, url=f"http://127.0.0.1:{port}", command=command))
    return systems


def pd_settings(*, threads: int, chunk: int) -> dict[str, Any]:
    """Arguments of a cluster with one prefill and one decode replica, half the threads each.

    Raises ValueError for an odd number of threads.
    """
    if threads % 2:
        raise ValueError(
            f"{threads} threads cannot be halved between a prefill and a decode replica; give an even number"
        )
    half = {"num_replicas": 1, "num_threads": threads // 2}
    return {"mode": "disaggregated", "prefill": {**half, "chunked_prefill_size": chunk}, "decode": half}


def aggregated_settings(*, threads: int, chunk: int) -> dict[str, Any]:
    """Arguments of a cluster with one replica that does everything, with all the threads."""
    replica = {"num_replicas": 1, "num_threads": threads, "chunked_prefill_size": chunk}
    return {"mode": "aggregated", "aggregated": replica}


def derive(base: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a Serve configuration whose (one) application's arguments are changed; sections are merged."""
    config = copy.deepcopy(dict(base))
    applications = config["applications"]
    if len(applications) != 1:
        raise ValueError(f"the configuration has {len(applications)} applications; one is expected")
    own = applications[0].setdefault("args", {})
    for key, value in settings.items():
        own[key] = {**own.get(key, {}), **value} if isinstance(value, dict) else value
    return config
