"""The env file, the ingress mode it leads to, and one cluster's own ports and paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.ingress import IngressMode, ingress_mode, own_ports_and_paths, read_env_file

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


def test_a_line_that_is_no_assignment_is_refused_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "serve.env"
    path.write_text("# fine\nA=1\n\nexport B=2\n")
    with pytest.raises(ValueError, match="line 4: 'export B=2'"):
        read_env_file(path)


def test_ports_differ_and_everything_lies_in_the_folder(tmp_path: Path) -> None:
    own = own_ports_and_paths(tmp_path)
    ports = [value for name, value in own.items() if name.endswith("_PORT")]
    assert len(set(ports)) == len(ports) == 4
    assert all(value.startswith(str(tmp_path)) for name, value in own.items() if not name.endswith("_PORT"))
