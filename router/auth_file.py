"""The file of API keys, read again when it changes.

Lifecycle: read once when made, which raises `BadKeyFile` for one that cannot be used; `watch` is a task of the router's
application and looks every second. From then on a file that cannot be used, or is gone, changes nothing: the keys there
are stay, the log says why, and a counter grows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path

from router.auth_keys import BadKeyFile, KeyTable, parse_keys
from router.metrics import RouterMetrics

_PERIOD_S = 1.0

_LOGGER = logging.getLogger(__name__)

_Version = tuple[int, int, int]


class KeyFile:
    """`table` is the last good one."""

    def __init__(self, path: Path, metrics: RouterMetrics) -> None:
        self._path = path
        self._metrics = metrics
        self._complaint = ""
        self._version: _Version | None = None
        with contextlib.suppress(OSError):  # reading it says what is wrong
            self._version = self._look()
        self.table = read_keys(path)
        metrics.add_gauge("router_api_keys", "API keys that are accepted", lambda: len(self.table))

    def refresh(self) -> None:
        """Read the file if it has changed."""
        try:
            version = self._look()
            if version == self._version:
                return
            table = parse_keys(self._path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, BadKeyFile) as error:
            self._complain(_words(error))
            return
        self._version, self._complaint = version, ""
        self.table = table
        self._metrics.key_file_reads.add(label="read")
        _LOGGER.info("read %d API keys from %s", len(table), self._path)

    async def watch(self) -> None:
        """Refresh every second, for ever."""
        while True:
            await asyncio.sleep(_PERIOD_S)
            try:
                await asyncio.to_thread(self.refresh)
            except Exception as error:  # whatever it is, the next second's keys may be right
                self._complain(type(error).__name__)

    def _look(self) -> _Version:
        status = self._path.stat()
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _complain(self, words: str) -> None:
        self._metrics.key_file_reads.add(label="refused")
        if words != self._complaint:
            _LOGGER.error("%s cannot be used, so the keys there were stay: %s", self._path, words)
        self._complaint = words


def read_keys(path: Path) -> KeyTable:
    """The keys in the file; raises `BadKeyFile` for one that cannot be used."""
    try:
        return parse_keys(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, BadKeyFile) as error:
        raise BadKeyFile(f"router.api_keys_file {path}: {_words(error)}") from error


def _words(error: Exception) -> str:
    return "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
