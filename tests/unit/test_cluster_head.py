"""What the head sees before anything starts, and what it makes of a Serve that is slow to."""

from __future__ import annotations

import traceback
from concurrent.futures import Future
from ctypes.util import find_library
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError

from cluster.config import ClusterConfig
from cluster.head import check_router_files, check_transfer
from cluster.launch_output import Progress
from cluster.readiness import StartFailed
from cluster.serve_start import is_deploying, wait_for_proxies, without_stacks
from transfer.doors import DoorParts, open_doors
from transfer.memory import SharedMemory


def failed(error: Exception) -> Future[None]:
    future: Future[None] = Future()
    future.set_exception(error)
    return future


@pytest.mark.parametrize("error", [ActorDiedError(), TimeoutError("not after 60 s\nmore")])
def test_late_proxies_are_left_to_the_health_check(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    wait_for_proxies(failed(error), Progress())
    assert f"waiting for them: {str(error).splitlines()[0]}\n" in capsys.readouterr().out


def test_what_else_goes_wrong_with_serve_ends_the_start() -> None:
    with pytest.raises(RuntimeError, match="no Serve"):
        wait_for_proxies(failed(RuntimeError("no Serve")), Progress())


def test_why_a_replica_did_not_start_is_told_without_stacks() -> None:
    def fail() -> None:
        raise ValueError("transfer.folder '/kv' is not a folder;\n  make it")

    try:
        fail()
    except ValueError:
        stack = traceback.format_exc()
    told = f"The deployment failed to start 3 times in a row. Error:\nray::Prefill (pid=1)\nRuntimeError: {stack}"
    assert without_stacks(told).splitlines() == [
        "The deployment failed to start 3 times in a row. Error:",
        "ValueError: transfer.folder '/kv' is not a folder;",
        "  make it",
    ]
    assert without_stacks("no resources\nat all") == "no resources\nat all"


def test_files_of_the_router_are_read_before_anything_starts(tmp_path: Path) -> None:
    keys, template = tmp_path / "keys.yaml", tmp_path / "own.jinja"
    with pytest.raises(StartFailed, match=r"router\.api_keys_file .*keys\.yaml.*No such file"):
        check_router_files(ClusterConfig(router={"api_keys_file": str(keys)}))
    keys.write_text("keys: [{key: sk-1, tenant: a}]")
    template.write_text("{% if %}")
    config = ClusterConfig(router={"api_keys_file": str(keys)}, model={"chat_template": str(template)})
    with pytest.raises(StartFailed, match="not valid jinja"):
        check_router_files(config)
    template.write_text("{{ messages }}")
    check_router_files(config)


def test_what_pages_travel_by_is_looked_for_before_anything_starts(tmp_path: Path) -> None:
    def config(**transfer: str) -> ClusterConfig:
        return ClusterConfig.model_validate({"transfer": transfer})

    with pytest.raises(StartFailed, match=r"transfer\.folder '.*/missing' is not a folder; make or mount it"):
        check_transfer(config(transport="disk", folder=str(tmp_path / "missing")))
    with pytest.raises(StartFailed, match="ib_device 'no such device' is not one of this machine's RDMA devices"):
        check_transfer(config(transport="mooncake", ib_device="no such device"))
    check_transfer(config(transport="disk", folder=str(tmp_path)))
    check_transfer(config(transport="mooncake"))


@pytest.mark.skipif(find_library("cuda") is not None, reason="for machines without NVIDIA's driver")
def test_nccl_is_refused_where_there_is_no_gpu() -> None:
    """Before anything starts, and by each replica: or all would go by TCP without a word."""
    remedy = r"transport 'nccl' needs NVIDIA's driver, .*; set transport to gloo or auto"
    with pytest.raises(StartFailed, match=remedy):
        check_transfer(ClusterConfig.model_validate({"transfer": {"transport": "nccl"}}))
    with SharedMemory(4096) as memory:
        pool = {"memory": memory, "page_bytes": 4096, "num_pages": 1, "replica_id": "r", "boot": 1, "secret": b"s"}
        parts = DoorParts(**pool, host="127.0.0.1", bind_host="127.0.0.1")
        with pytest.raises(ValueError, match=remedy):
            open_doors("nccl", parts)


@pytest.mark.parametrize(("state", "starts"), [("DEPLOYING", True), ("RUNNING", False), ("UNHEALTHY", False)])
def test_serve_is_asked_whether_it_still_starts_the_application(state: str, starts: bool) -> None:
    from ray.serve.schema import ApplicationStatusOverview, ServeStatus

    overview = ApplicationStatusOverview(status=state, message="", last_deployed_time_s=0.0, deployments={})
    assert is_deploying(ServeStatus(applications={"pd": overview}), "pd") is starts
    assert is_deploying(ServeStatus(applications={}), "pd"), "Serve has not heard of it yet"
    overview = ApplicationStatusOverview(
        status="DEPLOY_FAILED", message="no such model", last_deployed_time_s=0.0, deployments={}
    )
    with pytest.raises(RuntimeError, match="could not deploy pd: no such model"):
        is_deploying(ServeStatus(applications={"pd": overview}), "pd")
