"""From timelines to a trace that Perfetto can show (tracks, rows that only nest, one time scale), and asking for it."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from benchmarks.timeline import RequestFailed, fetch_timelines, phase_table
from benchmarks.trace import chrome_trace


def phase(name: str, replica: str, start_ms: float, duration_ms: float, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "epoch": 0,
        "replica": replica,
        "start_ms": start_ms,
        "duration_ms": duration_ms,
        **more,
    }


def timeline(received: float = 1000.0) -> dict[str, Any]:
    copy = {"transport": "shm", "peer": "P", "bytes": 4096}
    return {
        "received": received,
        "first_token_ms": 9.0,
        "total_ms": 20.0,
        "epochs": [
            {
                "epoch": 0,
                "prefill": "P",
                "decode": "D",
                "start_ms": 1.0,
                "duration_ms": 19.001,
                "outcome": "finished",
                "detail": "",
            }
        ],
        "phases": [
            phase("route", "router", 0.0, 1.0),
            phase("queue", "P", 1.0, 2.0),
            phase("compute", "P", 3.0, 6.0),
            phase("transfer", "D", 5.0, 2.0, **copy),
            phase("transfer", "D", 6.0, 4.0, **copy),
            phase("decode", "D", 11.0, 9.0),
        ],
    }


def slices(trace: dict[str, Any]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """The events with a duration, by process and row, in order of their starts, longer ones first."""
    found: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            found[event["pid"], event["tid"]].append(event)
    return {row: sorted(events, key=lambda event: (event["ts"], -event["dur"])) for row, events in found.items()}


def test_each_replica_is_a_process_of_the_trace() -> None:
    trace = chrome_trace({"request 0": timeline()})
    names = {e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    assert names == {1: "router", 2: "prefill P", 3: "decode D"}
    assert json.loads(json.dumps(trace)) == trace
    by_name = {e["name"]: e for e in trace["traceEvents"] if e["ph"] == "X"}
    assert (by_name["compute"]["pid"], by_name["compute"]["ts"], by_name["compute"]["dur"]) == (2, 3000, 6000)
    assert by_name["transfer"]["args"]["bytes"] == 4096
    assert by_name["epoch 0"]["args"]["outcome"] == "finished"


def test_what_shares_a_row_lies_within_or_apart() -> None:
    requests = {f"request {number}": timeline(received=1000.0 + 0.004 * number) for number in range(4)}
    rows = slices(chrome_trace(requests))
    found = [event for events in rows.values() for event in events if event["cat"] == "phase"]
    assert len(found) == 4 * (1 + len(timeline()["phases"])), "all phases and each request's epoch"
    for events in rows.values():
        around: list[float] = []
        for event in events:
            while around and around[-1] <= event["ts"]:
                around.pop()
            end = event["ts"] + event["dur"]
            assert not around or end <= around[-1], f"{event} sticks out of what it begins in"
            around.append(end)


def test_phases_at_a_replica_lie_within_a_slice_of_their_request() -> None:
    """So one reads which request a phase is of, and a row is not a jumble of several."""
    rows = slices(chrome_trace({"request 0": timeline(), "request 1": timeline(received=1000.004)}))
    for events in rows.values():
        request: dict[str, Any] = {}
        for event in events:
            if event["cat"] == "request":
                request = event
            else:
                assert request["ts"] <= event["ts"]
                assert event["ts"] + event["dur"] <= request["ts"] + request["dur"]


def test_each_epoch_at_a_replica_is_a_slice_of_its_own() -> None:
    again = timeline()
    again["epochs"].append(again["epochs"][0] | {"epoch": 1, "start_ms": 25.0, "duration_ms": 2.0})
    again["phases"].append(phase("queue", "D", 25.0, 2.0) | {"epoch": 1})
    again["total_ms"] = 27.0
    found = [
        e for e in chrome_trace({"request 0": again})["traceEvents"] if e.get("cat") == "request" and e["pid"] == 3
    ]
    assert [(e["args"]["epoch"], e["ts"]) for e in found] == [(0, 5000), (0, 6000), (1, 25000)]


def test_no_number_of_a_row_is_zero_or_that_of_another_row_or_a_process() -> None:
    """Perfetto puts row 0 of a process into the row that has the process's number, and drops what then overlaps."""
    rows = slices(chrome_trace({f"request {number}": timeline() for number in range(3)}))
    pids, tids = {pid for pid, _ in rows}, [tid for _, tid in rows]
    assert len(pids) == 3
    assert len({*pids, *tids, 0}) == len(pids) + len(tids) + 1


def test_what_follows_begins_when_what_was_before_ends() -> None:
    """To the nanosecond, at times of day whose sums binary fractions cannot hold: what overlaps would be dropped."""
    requests = {}
    for number in range(200):
        told = timeline(received=round(1_763_799_000 + 1.1 * number + 0.000_001 * number, 6))
        told["phases"][1:3] = [phase("queue", "P", 0.1 * number, 0.7), phase("compute", "P", 0.1 * number + 0.7, 6.3)]
        requests[f"request {number}"] = told
    for (pid, _), events in slices(chrome_trace(requests)).items():
        assert all(isinstance(event["ts"], int) and isinstance(event["dur"], int) for event in events)
        if pid == 2:
            queues = [event for event in events if event["name"] == "queue"]
            computes = [event for event in events if event["name"] == "compute"]
            assert [queue["ts"] + queue["dur"] for queue in queues] == [compute["ts"] for compute in computes]


def test_epochs_whose_rounded_times_overlap_are_put_one_after_the_other() -> None:
    failed_over = timeline()
    first = failed_over["epochs"][0]
    failed_over["epochs"] = [first | {"duration_ms": 4.001}, first | {"epoch": 1, "start_ms": 5.0, "duration_ms": 15.0}]
    spans = {e["name"]: e for e in chrome_trace({"request 0": failed_over})["traceEvents"] if e["ph"] == "X"}
    assert spans["epoch 0"]["ts"] + spans["epoch 0"]["dur"] == spans["epoch 1"]["ts"] == 5001


def test_a_flow_leads_through_each_request() -> None:
    trace = chrome_trace({"request 0": timeline(), "request 1": timeline(received=1000.004)})
    flows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in trace["traceEvents"]:
        if "bind_id" in event:
            flows[event["bind_id"]].append(event)
    assert len(flows) == 2
    for steps in flows.values():
        assert len({step["name"] for step in steps}) == 1
        assert [step["ts"] for step in steps] == sorted(step["ts"] for step in steps)
        assert {step["pid"] for step in steps} == {1, 2, 3}
        assert [step["flow_in"] for step in steps] == [False] + [True] * (len(steps) - 1)
        assert [step["flow_out"] for step in steps] == [True] * (len(steps) - 1) + [False]


def test_requests_are_put_on_one_scale_by_when_they_came() -> None:
    trace = chrome_trace({"late": timeline(received=1000.5), "early": timeline(received=1000.0)})
    starts = {e["name"]: e["ts"] for e in trace["traceEvents"] if e["ph"] == "X" and e["pid"] == 1}
    assert (starts["early"], starts["late"]) == (0, 500_000)


def test_nothing_begins_before_zero_whatever_the_clocks_of_the_hosts_say() -> None:
    behind = timeline(received=1000.0)
    behind["phases"][1]["start_ms"] = -250.0  # a viewer would drop it
    trace = chrome_trace({"behind": behind, "later": timeline(received=1001.0)})
    spans = {e["name"]: e for e in trace["traceEvents"] if e["ph"] == "X" and e["pid"] == 1}
    assert min(e["ts"] for e in trace["traceEvents"] if e["ph"] == "X") == 0
    assert [spans[name]["ts"] for name in ("behind", "later")] == [250_000, 1_250_000]


def test_the_table_adds_up_the_copies_of_a_request() -> None:
    table = phase_table({"a": timeline(), "b": timeline()})
    rows = {(row[0], row[1]): row[2:] for row in table.rows}
    assert rows["D", "transfer"] == (2, 6.0, 6.0, 6.0)
    assert rows["client", "total"] == (2, 20.0, 20.0, 20.0)


async def ask(server: TestServer) -> dict[str, dict[str, Any]]:
    url = str(server.make_url("/"))
    return await fetch_timelines(
        url, prompt_tokens=3, output_tokens=5, requests=2, concurrency=2, seed=0, timeout_s=10.0
    )


async def test_timelines_are_asked_for_and_returned_by_request() -> None:
    bodies: list[dict[str, Any]] = []

    async def generate(request: web.Request) -> web.Response:
        bodies.append(await request.json())
        return web.json_response({"meta_info": {"timeline": timeline()}})

    app = web.Application()
    app.router.add_post("/generate", generate)
    async with TestServer(app) as server:
        assert await ask(server) == {"request 0": timeline(), "request 1": timeline()}
    assert all(body["return_timeline"] is True for body in bodies)
    assert [len(body["input_ids"]) for body in bodies] == [3, 3]
    assert bodies[0]["input_ids"] != bodies[1]["input_ids"]


@pytest.mark.parametrize(("status", "words"), [(200, "told no timeline"), (503, "HTTP 503: .*busy")])
async def test_a_server_that_gives_none_is_named(status: int, words: str) -> None:
    async def generate(_: web.Request) -> web.Response:
        return web.json_response({"meta_info": {}, "error": "busy"}, status=status)

    app = web.Application()
    app.router.add_post("/generate", generate)
    async with TestServer(app) as server:
        with pytest.raises(RequestFailed, match=words):
            await ask(server)
