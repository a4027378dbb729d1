"""The env file, the ingress mode it leads to, and one cluster's own ports and paths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.ingress import (
    BadEnvFile,
    IngressMode,
    ingress_mode,
    own_ports_and_paths,
    read_env_file,
    write_error_page,
)

ENV_FILE = Path(__file__).resolve().parents[2] / "deploy" / "serve.env"


def test_the_env_file_turns_haproxy_on_and_says_how_ray_authenticates() -> None:
    variables = read_env_file(ENV_FILE)
    assert ingress_mode(variables) is IngressMode.HAPROXY
    assert variables["RAY_AUTH_MODE"] in ("token", "disabled")


def test_every_serve_variable_of_the_env_file_is_one_that_serve_reads() -> None:
    constants = pytest.importorskip("ray.serve._private.constants")
    source = Path(constants.__file__).read_text()
    for name in read_env_file(ENV_FILE):
        if name.startswith("RAY_SERVE_"):
            assert f'"{name}"' in source, name


def test_without_the_variables_serve_uses_its_python_proxy() -> None:
    assert ingress_mode({}) is IngressMode.PYTHON_PROXY
    assert ingress_mode({"RAY_SERVE_ENABLE_HA_PROXY": "0"}) is IngressMode.PYTHON_PROXY


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("export B=2", "'export B=2' is not NAME=value"),
        ("B=2 3", "put the value in quotes"),
        ("B='2", "No closing quotation"),
    ],
)
def test_a_line_that_is_no_assignment_is_refused_with_its_number(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "serve.env"
    path.write_text(f"# fine\nA=1\n\n{line}\n")
    with pytest.raises(BadEnvFile, match=f"line 4: .*{complaint}"):
        read_env_file(path)


def test_values_are_what_a_shell_would_make_of_them(tmp_path: Path) -> None:
    path = tmp_path / "serve.env"
    path.write_text("A=1\nB='2 3'\nC=\n")
    assert read_env_file(path) == {"A": "1", "B": "2 3", "C": ""}


def test_the_error_page_replaces_serves_own_and_nothing_else(tmp_path: Path) -> None:
    environ = {"RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(tmp_path / "haproxy.cfg")}
    write_error_page(environ, retry_after_s=3)
    assert list(tmp_path.iterdir()) == []
    page = tmp_path / "a node" / "500.http"
    page.parent.mkdir()
    page.write_text("HTTP/1.1 500 Internal Server Error\r\n\r\n")
    write_error_page(environ, retry_after_s=3)
    head, _, body = page.read_bytes().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    assert f"Content-Length: {len(body)}".encode() in head.split(b"\r\n")
    assert json.loads(body)["error"]["code"] == "no_router"
    assert list(tmp_path.rglob("*")) == [page.parent, page]


def test_ports_differ_and_everything_lies_in_the_folder(tmp_path: Path) -> None:
    own = own_ports_and_paths(tmp_path)
    ports = [value for name, value in own.items() if name.endswith("_PORT")]
    assert len(set(ports)) == len(ports) == 4
    assert all(value.startswith(str(tmp_path)) for name, value in own.items() if not name.endswith("_PORT"))


def test_no_port_is_one_that_the_system_may_give_to_others_before_haproxy_listens(tmp_path: Path) -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    if first < 30_000:
        pytest.skip(f"this system gives away nearly every port, from {first}")
    own = own_ports_and_paths(tmp_path)
    ports = [int(value) for name, value in own.items() if name.endswith("_PORT")]
    assert [port for port in ports if first <= port <= last] == []
