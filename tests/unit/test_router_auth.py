"""API keys: the file, its rotation, and the gate before the endpoints; cross-origin requests before that."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from router_harness import running_router, until

from router.auth_file import KeyFile
from router.auth_keys import BadKeyFile, Principal, TenantLimits, parse_keys
from router.metrics import RouterMetrics

KEYS = f"""
keys:
  - {{key: sk-alice, tenant: alice, admin: true}}
  - {{sha256: {hashlib.sha256(b"sk-bob").hexdigest()}, tenant: bob}}
tenants:
  alice: {{requests_per_minute: 5}}
default_limits: {{tokens_per_minute: 7000}}
"""


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def replace(path: Path, text: str) -> None:
    """As a careful writer does: the file is whole at every moment."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    os.replace(fresh, path)


# ---- the file ---------------------------------------------------------------------------------------------------


def test_keys_are_found_plain_or_hashed() -> None:
    table = parse_keys(KEYS)
    assert table.find("sk-alice") == Principal("alice", admin=True)
    assert table.find("sk-bob") == Principal("bob")
    assert [table.find(key) for key in ("", "sk-alic", "sk-alice ", hashlib.sha256(b"sk-bob").hexdigest())] == [
        None
    ] * 4
    assert table.limits("alice") == TenantLimits(requests_per_minute=5)
    assert table.limits("bob") == TenantLimits(tokens_per_minute=7000)
    assert "sk-alice" not in repr(vars(table))


def test_json_is_read_too() -> None:
    assert parse_keys(json.dumps({"keys": [{"key": "k", "tenant": "t"}]})).find("k") == Principal("t")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "Expected `object`"),
        ("keys: []", "keys is empty"),
        ("keys: [{key: SECRET, tenant: a}, {key: SECRET, tenant: b}]", r"keys\[1\]: .* twice"),
        ("keys: [{tenant: a}]", r"keys\[0\] needs either key or sha256"),
        ("keys: [{key: SECRET, sha256: abc, tenant: a}]", r"keys\[0\] needs either key or sha256"),
        ("keys: [{sha256: abc, tenant: a}]", "64 hexadecimal digits"),
        ("keys: [{key: 'SECRET with spaces', tenant: a}]", "visible ASCII"),
        ("keys: [{key: SECRET, tenant: 'a b'}]", r"keys\[0\].tenant is 'a b'"),
        ("keys: [{key: SECRET, tenent: a}]", "tenent"),
        ("keys: [{key: 5, tenant: a}]", r"Expected `str.*keys\[0\].key"),
        ("keys: [{key: SECRET, tenant: a}]\ntenants: {a: {requests_per_minute: 0}}", "requests_per_minute"),
        ("keys: [{key: SECRET, tenant: a}", r"neither YAML nor JSON \(line 1\)"),
        ("keys: [{key: SECRET, tenant: 2024-13-45}]", "neither YAML nor JSON"),
        ("[" * 5000, "neither YAML nor JSON"),
    ],
)
def test_a_bad_file_is_named_without_quoting_a_key(text: str, complaint: str) -> None:
    with pytest.raises(BadKeyFile, match=complaint) as caught:
        parse_keys(text)
    assert "SECRET" not in str(caught.value)


def test_a_changed_file_is_read_and_a_bad_one_keeps_the_old_keys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, metrics = tmp_path / "keys.yaml", RouterMetrics()
    path.write_text(KEYS)
    keys = KeyFile(path, metrics)
    replace(path, "keys: [{key: sk-carol, tenant: carol}]")
    keys.refresh()
    assert (keys.table.find("sk-alice"), keys.table.find("sk-carol")) == (None, Principal("carol"))

    with caplog.at_level(logging.ERROR):
        replace(path, "keys: [{key: sk-dora}]")
        keys.refresh()
        keys.refresh()
        path.unlink()
        keys.refresh()
    assert keys.table.find("sk-carol") == Principal("carol")
    assert [record.levelname for record in caplog.records if record.levelno >= logging.ERROR] == ["ERROR", "ERROR"]
    assert "sk-" not in caplog.text
    assert metrics.key_file_reads.values == {"read": 1, "refused": 3}

    path.write_text(KEYS)
    keys.refresh()
    assert keys.table.find("sk-bob") == Principal("bob")


def test_a_router_does_not_start_without_its_keys(tmp_path: Path) -> None:
    with pytest.raises(BadKeyFile, match=r"router\.api_keys_file .*absent.*No such file"):
        KeyFile(tmp_path / "absent", RouterMetrics())


# ---- the gate ---------------------------------------------------------------------------------------------------


async def test_only_keys_come_in_and_only_admins_everywhere(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(KEYS)
    async with running_router(tmp_path / "model", api_keys_file=path) as router:
        replica, _ = await router.pair(automatic=True)

        async def status(path: str, headers: dict[str, str] | None = None) -> Any:
            return (await router.get(path, headers=headers).done()).status

        for open_path in ("/health",):
            assert await status(open_path) == 200
        for headers in (
            None,
            bearer("sk-nobody"),
            {"Authorization": "Basic sk-alice"},
            {"x-api-key": "sk-nobody"},
            bearer("sk-nobody") | {"x-api-key": "sk-alice"},
        ):
            call = await router.get("/v1/models", headers=headers).done()
            assert (call.status, call.headers["www-authenticate"]) == (401, "Bearer")
            assert call.json["error"]["type"] == "authentication_error"
            assert call.json["error"]["code"] in ("missing_api_key", "invalid_api_key")
            assert "sk-" not in call.body.decode()
        assert await status("/nowhere") == 401
        assert await status("/v1/models", bearer("sk-bob")) == 200
        assert await status("/v1/models", {"authorization": "bearer  sk-bob"}) == 200
        assert await status("/v1/models", {"x-api-key": "sk-bob"}) == 200
        assert await status("/internal/state", bearer("sk-bob")) == 403
        assert await status("/internal/state", bearer("sk-alice")) == 200

        body = {"prompt": "a fox", "max_tokens": 2}
        await router.post("/v1/completions", body, headers=bearer("sk-bob")).done()
        await router.post("/v1/completions", body | {"cache_salt": "s"}, headers=bearer("sk-bob")).done()
        await router.post("/v1/completions", body | {"cache_salt": "s"}, headers=bearer("sk-alice")).done()
        namespaces = [each.job.namespace for each in replica.opens]
        assert namespaces[0] == "bob"
        assert len(set(namespaces)) == 3

        replace(path, "keys: [{key: sk-new, tenant: bob}]")
        await until(lambda: router.metrics.key_file_reads["read"] == 1)
        assert await status("/v1/models", bearer("sk-bob")) == 401
        assert await status("/v1/models", bearer("sk-new")) == 200


async def test_without_a_file_everybody_comes_in(tmp_path: Path) -> None:
    async with running_router(tmp_path) as router:
        assert (await router.get("/internal/state").done()).status == 200
        replica, _ = await router.pair(automatic=True)
        await router.post("/v1/completions", {"prompt": "a fox", "max_tokens": 2}).done()
        await router.post("/generate", {"text": "a fox", "extra_key": "salt"}).done()
        assert replica.opens[0].job.namespace == ""
        assert replica.opens[1].job.namespace != ""


# ---- cross-origin requests --------------------------------------------------------------------------------------

PAGE = "https://app.example.com"
ASKING = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}


async def test_pages_may_only_ask_from_configured_origins(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(KEYS)
    async with running_router(tmp_path / "model", api_keys_file=path, cors_origins=(PAGE,)) as router:
        preflight = await router.request("OPTIONS", "/v1/models", headers=ASKING).done()
        assert (preflight.status, preflight.headers["access-control-allow-origin"]) == (204, PAGE)
        assert preflight.headers["access-control-allow-headers"] == "authorization"
        refused = await router.request("OPTIONS", "/v1/models", headers=ASKING | {"Origin": "https://evil"}).done()
        assert (refused.status, "access-control-allow-origin" in refused.headers) == (403, False)
        assert refused.json["error"]["code"] == "origin_not_allowed"
        for key, status in (("sk-bob", 200), ("sk-nobody", 401)):
            call = await router.get("/v1/models", headers=bearer(key) | {"Origin": PAGE}).done()
            assert (call.status, call.headers["access-control-allow-origin"]) == (status, PAGE)
            assert call.headers["vary"] == "Origin"
        other = await router.get("/v1/models", headers=bearer("sk-bob") | {"Origin": "https://evil"}).done()
        assert (other.status, "access-control-allow-origin" in other.headers) == (200, False)


async def test_any_page_may_ask_where_configured_and_none_by_default(tmp_path: Path) -> None:
    async with running_router(tmp_path, cors_origins=("*",)) as router:
        call = await router.get("/v1/models", headers={"Origin": PAGE}).done()
        assert call.headers["access-control-allow-origin"] == "*"
    async with running_router(tmp_path) as router:
        assert (await router.request("OPTIONS", "/v1/models", headers=ASKING).done()).status == 405
        call = await router.get("/v1/models", headers={"Origin": PAGE}).done()
        assert "access-control-allow-origin" not in call.headers


# ---- the rest of the contract -----------------------------------------------------------------------------------


async def test_what_is_not_there_is_refused_in_the_apis_words(tmp_path: Path) -> None:
    async with running_router(tmp_path, max_body_bytes=1024) as router:
        cases = [
            (router.get("/nowhere"), 404, "not_found"),
            (router.get("/v1/completions"), 405, "method_not_allowed"),
            (router.post("/v1/models", {}), 405, "method_not_allowed"),
            (router.post("/v1/completions", {"prompt": "a" * 2000}), 413, "body_too_large"),
            (router.post("/generate", {}, headers={"Content-Type": "text/plain"}), 415, "unsupported_media_type"),
            (router.post("/tokenize", {}, headers={"Content-Encoding": "gzip"}), 415, "unsupported_content_encoding"),
        ]
        for call, status, code in cases:
            await call.done()
            assert (call.status, call.json["error"]["code"]) == (status, code)
            assert set(call.json["error"]) == {"message", "type", "code", "param"}
        assert cases[1][0].headers["allow"] == "POST"
        assert cases[2][0].headers["allow"] == "GET, HEAD"
        assert router.metrics.requests.values == {"404": 1, "405": 2, "413": 1, "415": 2}
        for kind in ("application/json", "application/json; charset=utf-8", "application/problem+json"):
            call = await router.post("/tokenize", {"prompt": "a"}, headers={"Content-Type": kind}).done()
            assert call.status == 200
