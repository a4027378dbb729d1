"""The cluster as `make serve` runs it: the official client, Ray's dashboard and metrics, redeployment, and the end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_cluster import ROOT, LiveCluster
from made_up_requests import every_operation_answers
from openai import OpenAI

from cluster.process_tree import descendants

pytestmark = [pytest.mark.integration, pytest.mark.ray]

MODEL = "SmolLM2-135M-Instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
DELETE = """
import sys
import ray
from ray import serve
ray.init(namespace="serve", logging_level="ERROR", log_to_driver=False)
print("ready", flush=True)
sys.stdin.readline()
serve.delete("pd")
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveCluster]:
    live = LiveCluster.start({}, tmp_path_factory.mktemp("cluster"))
    yield live
    if live.process.poll() is None:
        live.stop()


@pytest.fixture
def client(cluster: LiveCluster) -> OpenAI:
    return OpenAI(base_url=f"{cluster.url}/v1", api_key="none", timeout=60.0, max_retries=0)


def said(cluster: LiveCluster, pattern: str) -> str:
    """What the launcher printed after a word."""
    found = re.search(pattern, cluster.log.read_text())
    assert found is not None, cluster.log.read_text()
    return found[1]


def test_chat_is_the_same_streamed_and_not(client: OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=24)
    stream = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        temperature=0,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert "Paris" in streamed
    assert streamed == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [model.id for model in client.models.list()] == [MODEL]


def test_completions_are_the_same_streamed_and_not(client: OpenAI) -> None:
    request: dict[str, Any] = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 16, "seed": 7}
    whole = client.completions.create(**request)
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**request, stream=True))
    assert streamed == whole.choices[0].text
    assert whole.choices[0].finish_reason in ("stop", "length")


def test_http_came_by_haproxy_and_went_through_both_halves(cluster: LiveCluster) -> None:
    assert "behind HAProxy" in cluster.log.read_text()
    states = cluster.replica_states().values()
    assert sum(state["prefill"]["counters"]["delivered"] for state in states) > 0
    assert sum(state["decode"]["counters"]["admitted"] for state in states) > 0


def test_requests_made_up_from_the_openapi_document_are_answered(cluster: LiveCluster) -> None:
    assert every_operation_answers(cluster.url, examples=5) > 10


def test_the_dashboard_shows_every_deployment_healthy(cluster: LiveCluster) -> None:
    dashboard = said(cluster, r"dashboard +(http://\S+)")
    token = Path(cluster.ray_environment()["RAY_AUTH_TOKEN_PATH"]).read_text()
    request = urllib.request.Request(
        f"{dashboard}/api/serve/applications/", headers={"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        (application,) = json.load(answer)["applications"].values()
    statuses = {name: deployment["status"] for name, deployment in application["deployments"].items()}
    assert statuses == dict.fromkeys(["Router", "Prefill", "Decode", "Directory"], "HEALTHY")


def test_its_metrics_are_scraped(cluster: LiveCluster) -> None:
    wanted = {
        "ray_pd_router_ttft_seconds_bucket",
        "ray_pd_router_itl_seconds_count",
        "ray_pd_router_requests_total",
        "ray_pd_replica_free_pages",
        "ray_pd_replica_rooms",
        "ray_pd_replica_stage_seconds_bucket",
        "ray_pd_replica_fetched_bytes_total",
    }

    def all_there() -> bool:
        return wanted <= scraped_names(Path(said(cluster, r"metrics +(/\S+)")))

    cluster.wait(all_there, f"metrics {sorted(wanted)}", 60.0)


def test_the_logs_of_all_deployments_are_where_it_says(cluster: LiveCluster) -> None:
    names = {path.name.split("_")[2] for path in Path(said(cluster, r"logs +(/\S+)")).glob("replica_pd_*.log")}
    assert names == {"Router", "Prefill", "Decode", "Directory"}


def folder_of(cluster: LiveCluster) -> Path:
    """The launcher's folder of sockets and logs, as the command line of one of its processes names it."""
    for pid in descendants(cluster.process.pid):
        found = re.search(rb"cluster\.head\0--folder\0([^\0]+)", Path(f"/proc/{pid}/cmdline").read_bytes())
        if found is not None:
            return Path(found[1].decode())
    raise AssertionError("no process of the launcher names its folder")


def scraped_names(targets: Path) -> set[str]:
    """Names of all metrics that Prometheus would find now."""
    names: set[str] = set()
    for group in json.loads(targets.read_text()):
        for target in group["targets"]:
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                names.update(re.findall(r"(?m)^(\w+)[{ ]", answer.read().decode()))
    return names


def test_requests_go_on_while_the_directory_is_away_and_it_comes_back_knowing_everyone(
    cluster: LiveCluster, client: OpenAI
) -> None:
    known = set(cluster.replica_states())
    before = cluster.deployment_pids("Directory")
    cluster.signal("Directory", signal.SIGKILL)
    assert client.completions.create(model=MODEL, prompt="Nobody notices", max_tokens=4).choices
    cluster.wait(lambda: cluster.deployment_pids("Directory") not in ([], before), "another directory", 60.0)
    cluster.wait(lambda: set(cluster.replica_states()) == known, "heartbeats of all replicas", 60.0)
    assert all(member["usable"] for member in cluster.state()["members"])


def test_a_second_cluster_is_refused_the_port_and_does_no_harm(cluster: LiveCluster, client: OpenAI) -> None:
    port = cluster.url.rpartition(":")[2]
    second = subprocess.run(
        [sys.executable, "-m", "cluster.launch", "--port", port],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert second.returncode == 1
    assert f"port {port} on 127.0.0.1 cannot be used" in second.stderr
    assert client.completions.create(model=MODEL, prompt="Still", max_tokens=1).choices


def test_a_deleted_application_finishes_its_streams(cluster: LiveCluster, client: OpenAI) -> None:
    """Drain: Serve waits for the router's request, and each replica for its rooms."""
    deleting = subprocess.Popen(
        [sys.executable, "-c", DELETE],
        env=os.environ | cluster.ray_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert deleting.stdin is not None
    assert deleting.stdout is not None
    assert deleting.stdout.readline() == "ready\n"
    stream = client.completions.create(
        model=MODEL, prompt="Count:", max_tokens=600, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    events = []
    for event in stream:
        if not events:
            deleting.stdin.write("go\n")
            deleting.stdin.flush()
        events.append(event)
    assert events[-1].choices[0].finish_reason == "length"
    assert deleting.wait(60) == 0


def test_the_end_leaves_nothing_behind(cluster: LiveCluster) -> None:
    folder = folder_of(cluster)
    processes = descendants(cluster.process.pid)
    assert processes
    cluster.stop()
    assert cluster.process.returncode == 0
    assert not folder.exists()
    assert [pid for pid in processes if Path(f"/proc/{pid}").exists()] == []
    assert list(cluster.temporary.iterdir()) == []
