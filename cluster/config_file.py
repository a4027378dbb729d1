"""A Serve config file, as `serve run` takes it, read by the launcher: one application, checked before Ray starts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cluster.config import ClusterConfig
from cluster.tls import Tls

IMPORT_PATH = "cluster.app:build_app"
_DOCUMENT_KEYS = {"applications", "http_options", "proxy_location"}
_APPLICATION_KEYS = {"name", "route_prefix", "import_path", "args"}
_TLS_KEYS = {"ssl_certfile", "ssl_keyfile", "ssl_keyfile_password"}
_HTTP_KEYS = {"host", "port"} | _TLS_KEYS


class BadConfigFile(ValueError):
    """The file is not one that this program can start; the message says why."""


@dataclass(frozen=True, kw_only=True)
class ServeApplication:
    """The one application of a config file, and where it wants to be reached."""

    name: str
    route_prefix: str
    host: str
    port: int
    tls: Tls | None
    config: ClusterConfig

    def at(self, host: str | None, port: int | None) -> ServeApplication:
        """The same, reached elsewhere where either is given."""
        return replace(self, host=self.host if host is None else host, port=self.port if port is None else port)

    @classmethod
    def read(cls, path: Path) -> ServeApplication:
        """Raises `BadConfigFile`."""
        try:
            document = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise BadConfigFile(f"{path} is not YAML: {error}") from error
        listed = document.get("applications") if isinstance(document, dict) else None
        if not isinstance(listed, list) or len(listed) != 1 or not isinstance(listed[0], dict):
            raise BadConfigFile(f"{path} must list exactly one application, as deploy/config.yaml does")
        (entry,) = listed
        http = document.get("http_options") or {}
        if not isinstance(http, dict):
            raise BadConfigFile(f"{path}: http_options is {http!r}; give host and port, as deploy/config.yaml does")
        _only_known(path, document, entry)
        try:
            config = ClusterConfig.model_validate(entry.get("args") or {})
        except ValidationError as error:
            raise BadConfigFile(f"{path}: {_readable(error)}") from error
        return cls(
            name=entry.get("name", "default"),
            route_prefix=entry.get("route_prefix", "/"),
            host=str(http.get("host", "127.0.0.1")),
            port=http.get("port", 8000),
            tls=_tls(path, http),
            config=config,
        )


def _only_known(path: Path, document: dict[str, Any], entry: dict[str, Any]) -> None:
    """What only Serve's own commands apply must not be dropped in silence."""
    http = document.get("http_options") or {}
    unknown = sorted({*document.keys() - _DOCUMENT_KEYS, *entry.keys() - _APPLICATION_KEYS, *http.keys() - _HTTP_KEYS})
    if unknown:
        raise BadConfigFile(
            f"{path} has {', '.join(map(repr, unknown))}, which `make serve` does not apply: say it in `args` where "
            "cluster/config.py has a key for it, or start the file with `serve run`"
        )
    if (import_path := entry.get("import_path", IMPORT_PATH)) != IMPORT_PATH:
        raise BadConfigFile(f"{path}: import_path is {import_path!r}; `make serve` starts {IMPORT_PATH!r}")


def _tls(path: Path, http: dict[str, Any]) -> Tls | None:
    given = {key: http[key] for key in _TLS_KEYS & http.keys()}
    if not given:
        return None
    certfile, keyfile = given.get("ssl_certfile"), given.get("ssl_keyfile")
    if not (isinstance(certfile, str) and isinstance(keyfile, str)):
        raise BadConfigFile(f"{path}: http_options needs both ssl_certfile and ssl_keyfile for TLS, or neither")
    password = given.get("ssl_keyfile_password")
    return Tls(certfile=certfile, keyfile=keyfile, password=None if password is None else str(password))


def _readable(error: ValidationError) -> str:
    """One line for each mistake: where, and what."""
    lines = []
    for each in error.errors():
        place = ".".join(["args", *map(str, each["loc"])])
        words = each["msg"].removeprefix("Value error, ")
        unsaid = isinstance(each["input"], dict) or each["loc"] == ("secret",)
        given = "" if unsaid else f" is {each['input']!r}"
        lines.append(f"{place}{given}: {words}")
    return "\n".join(lines)
