"""Keys, tenants and streams that are come back to, on a cluster of two routers behind HAProxy; and HTTPS on another."""

from __future__ import annotations

import http.client
import json
import os
import signal
import ssl
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from live_cluster import LiveCluster
from self_signed import make_certificate

pytestmark = [pytest.mark.integration, pytest.mark.ray]

MODEL = "SmolLM2-135M-Instruct"
KEYS = {
    "keys": [
        {"key": "k-ann", "tenant": "ann", "admin": True},
        {"key": "k-ben", "tenant": "ben"},
        {"key": "k-eve", "tenant": "eve"},
        {"key": "k-eve-2", "tenant": "eve"},
        {"key": "k-fay", "tenant": "fay"},
    ],
    "tenants": {
        "ben": {"requests_per_minute": 6},
        "eve": {"tokens_per_minute": 600, "max_priority": 3},
        "fay": {"max_concurrent_requests": 1},
    },
}
LONG = "The lighthouse keeper wrote in his log every evening: the wind, the height of the waves, the ships. " * 3
BODY: dict[str, Any] = {"prompt": "The fox went into the forest and", "max_tokens": 48, "temperature": 0}
_WAIT_S = 60.0


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    path.write_text(json.dumps(KEYS))
    return path


@pytest.fixture(scope="module")
def cluster(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveCluster]:
    settings = {"model": {"dtype": "float32"}, "router": {"num_replicas": 2, "api_keys_file": str(keys)}}
    live = LiveCluster.start(settings, tmp_path_factory.mktemp("cluster"))
    yield live
    live.stop()


def client(cluster: LiveCluster, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key=key, timeout=_WAIT_S, max_retries=0)


class UnavailableError(Exception):
    """503: try again."""


def parse_number(event_id: str) -> int:
    return int(event_id.partition(":")[2].partition(".")[0])


def status(cluster: LiveCluster, path: str, key: str) -> int:
    return httpx.get(f"{cluster.url}{path}", headers={"x-api-key": key}, trust_env=False).status_code


def cut_off(cluster: LiveCluster, method: str, path: str, last: str | None, *, after: int) -> list[tuple[str, str]]:
    """(id, data) of a stream's events up to a number of them, over a connection of its own, which is then dropped."""
    address = urllib.parse.urlsplit(cluster.url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=_WAIT_S)
    headers = {"Authorization": "Bearer k-ann", "Content-Type": "application/json"}
    body = json.dumps({**BODY, "stream": True}) if method == "POST" else None
    connection.request(method, path, body, headers if last is None else headers | {"Last-Event-ID": last})
    answer = connection.getresponse()
    if answer.status == 503:
        connection.close()
        raise UnavailableError
    assert answer.status == 200, answer.read()
    events, name = [], ""
    for line in answer:
        field, _, value = line.decode().rstrip("\n").partition(": ")
        if field == "id":
            name = value
        elif field == "data":
            events.append((name, value))
            if len(events) == after:
                break
    answer.close()
    connection.close()
    return events


def test_a_stream_goes_on_over_many_connections_and_both_routers(cluster: LiveCluster) -> None:
    whole = client(cluster, "k-ann").completions.create(model=MODEL, **BODY).choices[0].text
    for turn in range(2):
        events = cut_off(cluster, "POST", "/v1/completions", None, after=3 + turn)
        while events[-1][1] != "[DONE]":
            last = events[-1][0]
            if len(events) % 2:
                events += cut_off(cluster, "POST", "/v1/completions", last, after=4)
            else:
                events += cut_off(cluster, "GET", f"/v1/streams/{last.partition(':')[0]}", last, after=4)
        assert [parse_number(name) for name, _ in events] == list(range(1, len(events) + 1))
        assert "".join(json.loads(data)["choices"][0]["text"] for _, data in events[:-1]) == whole


def test_cached_prefixes_are_of_one_tenant_and_one_salt(cluster: LiveCluster) -> None:
    def cached(key: str, **fields: Any) -> int:
        done = client(cluster, key).completions.create(model=MODEL, prompt=LONG, max_tokens=1, extra_body=fields)
        assert done.usage is not None
        assert done.usage.prompt_tokens_details is not None
        return done.usage.prompt_tokens_details.cached_tokens or 0

    assert cached("k-ann") == 0
    whole_pages = cached("k-ann")
    assert whole_pages >= 48
    assert cached("k-eve") == 0
    assert cached("k-eve-2") == whole_pages, "the other key of the same tenant"
    for salt in ("red", "blue"):
        assert cached("k-ann", cache_salt=salt) == 0
        assert cached("k-ann", cache_salt=salt) == whole_pages
    assert cached("k-eve", cache_salt="red") == 0, "another tenant's salt"


def test_nobody_overtakes_other_tenants_without_leave(cluster: LiveCluster) -> None:
    def ask(key: str, priority: int) -> None:
        client(cluster, key).completions.create(
            model=MODEL, prompt="Hello", max_tokens=1, extra_body={"priority": priority}
        )

    ask("k-eve", -3)
    ask("k-ben", 5)
    for key, priority in (("k-eve", -4), ("k-ben", -1)):
        with pytest.raises(openai.PermissionDeniedError, match="before others") as caught:
            ask(key, priority)
        assert caught.value.param == "priority"


def test_tokens_a_minute_are_limited_over_both_routers(cluster: LiveCluster) -> None:
    eve = client(cluster, "k-eve")

    def ask(times: int) -> None:
        for _ in range(times):
            eve.completions.create(model=MODEL, prompt=LONG, max_tokens=1)

    with pytest.raises(openai.RateLimitError, match="600 a minute are left") as caught:
        ask(40)  # two limits' worth at most, and what fills up meanwhile
    told = caught.value.response.headers
    assert 1 <= int(told["retry-after"]) <= 70
    assert told["x-ratelimit-limit-tokens"] == "600"
    assert int(told["x-ratelimit-remaining-tokens"]) < 100
    with pytest.raises(openai.RateLimitError, match="send less") as caught:
        eve.completions.create(model=MODEL, prompt=LONG * 10, max_tokens=1)
    assert "retry-after" not in caught.value.response.headers


def test_requests_at_once_are_limited_over_both_routers(cluster: LiveCluster) -> None:
    fay = client(cluster, "k-fay")
    told: list[tuple[str, bool]] = []

    def refused() -> bool:
        try:
            client(cluster, "k-fay").completions.create(model=MODEL, prompt="Hello", max_tokens=1)
        except openai.RateLimitError as error:
            told.append((error.response.headers["retry-after"], "and 1 are allowed" in error.message))
            return True
        return False

    with fay.completions.create(
        model=MODEL, prompt="Hello", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
        # Every other connection sees the router that has the stream; the other one hears of it within two seconds.
        cluster.wait(lambda: all(refused() for _ in range(4)), "both routers to refuse", _WAIT_S)
    assert set(told) == {("1", True)}
    cluster.wait(lambda: not any(refused() for _ in range(4)), "both routers to take requests again", _WAIT_S)


def test_limits_hold_over_both_routers_and_are_lifted_by_a_new_file(cluster: LiveCluster, keys: Path) -> None:
    ben = client(cluster, "k-ben")

    def ask(times: int) -> None:
        for _ in range(times):
            ben.completions.create(model=MODEL, prompt="Hello", max_tokens=1)

    with pytest.raises(openai.RateLimitError, match="6 a minute") as caught:
        ask(30)  # at most two limits' worth, and what fills up meanwhile
    assert caught.value.response.headers["x-ratelimit-remaining-requests"] == "0"
    # 10 s for one; both routers may have let the whole limit in before they heard of each other.
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 70

    keys.with_suffix(".new").write_text(json.dumps({"keys": [*KEYS["keys"], {"key": "k-cat", "tenant": "cat"}]}))
    keys.with_suffix(".new").replace(keys)

    def lifted() -> bool:
        """Four new connections see both routers."""
        return {status(cluster, "/v1/models", "k-cat") for _ in range(4)} == {200}

    cluster.wait(lifted, "both routers to read the new keys", _WAIT_S)
    ask(4)


def test_a_stream_outlives_the_routers_that_had_it(cluster: LiveCluster) -> None:
    whole = client(cluster, "k-ann").completions.create(model=MODEL, **BODY).choices[0].text
    events = cut_off(cluster, "POST", "/v1/completions", None, after=7)
    for pid in cluster.deployment_pids("Router"):
        os.kill(pid, signal.SIGKILL)
    rest: list[tuple[str, str]] = []

    def goes_on() -> bool:
        try:
            rest.extend(cut_off(cluster, "POST", "/v1/completions", events[-1][0], after=len(whole)))
        except UnavailableError:
            return False
        return True

    cluster.wait(goes_on, "a router that generates the stream once more", 3 * _WAIT_S)
    assert [parse_number(name) for name, _ in events + rest] == list(range(1, len(events + rest) + 1))
    assert "".join(json.loads(data)["choices"][0]["text"] for _, data in (events + rest)[:-1]) == whole


def test_who_has_no_key_gets_no_answer(cluster: LiveCluster) -> None:
    with pytest.raises(openai.AuthenticationError, match="not one of this server's"):
        client(cluster, "k-dan").completions.create(model=MODEL, prompt="Hello")
    assert status(cluster, "/internal/state", "k-ben") == 403
    assert status(cluster, "/internal/state", "k-ann") == 200
    assert status(cluster, "/health", "") == 200


def test_a_certificate_makes_it_https(tmp_path: Path) -> None:
    certfile, keyfile = make_certificate(tmp_path)
    options = {"ssl_certfile": str(certfile), "ssl_keyfile": str(keyfile)}
    cluster = LiveCluster.start({"mode": "aggregated"}, tmp_path, http_options=options)
    try:
        trusting = httpx.Client(verify=ssl.create_default_context(cafile=str(certfile)), trust_env=False)
        api = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", http_client=trusting, max_retries=0)
        stream = api.completions.create(model=MODEL, **BODY, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream)
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{cluster.url}/health", trust_env=False)
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"{cluster.url}/health".replace("https", "http"), trust_env=False)
    finally:
        cluster.stop()
