"""Makes or refreshes the virtual environment: `python3.11 deploy/install.py [--extras dev,gpu]`. Standard library only.

Nothing is done when the environment was made from the same pyproject.toml, Python and choices, so it costs a second
start no time. torch is the one package with a choice: on a machine without an NVIDIA GPU its CPU build is taken, which
is ten times smaller. PD_TORCH_INDEX names another package index for it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_PROBE_TIMEOUT_S = 5.0
_REPOSITORY = Path(__file__).resolve().parent.parent


def main() -> int:
    """0 when the environment is ready, 1 when it could not be made."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=_REPOSITORY / ".venv")
    parser.add_argument("--extras", default="", help="comma-separated extras of pyproject.toml")
    parser.add_argument("--cpu-only", action="store_true", help="fail rather than install a CUDA build of torch")
    options = parser.parse_args()
    extras = sorted(filter(None, options.extras.split(",")))
    stamp = options.venv / "installed.json"
    inputs = _inputs()
    if _is_current(stamp, inputs, extras):
        return 0
    try:
        _install(options.venv, extras, cpu_only=options.cpu_only)
    except subprocess.CalledProcessError as error:
        print(f"failed: {' '.join(map(str, error.cmd))}", file=sys.stderr)
        return 1
    stamp.write_text(json.dumps({"inputs": inputs, "extras": extras}) + "\n")
    return 0


def _install(venv: Path, extras: list[str], *, cpu_only: bool) -> None:
    python = venv / "bin" / "python"
    if not python.exists():
        print(f"making the virtual environment {venv}", flush=True)
        _run([sys.executable, "-m", "venv", str(venv)])
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    torch = _requirement("torch")
    index = _torch_index()
    if cpu_only and index is None and not _takes_cpu_build([*pip, torch]):
        raise SystemExit(f"pip would install a CUDA build for {torch!r}; set PD_TORCH_INDEX to an index of CPU builds")
    print(f"installing {torch} from {index or 'the configured package index'}", flush=True)
    _run([*pip, *(["--index-url", index] if index else []), torch])
    package = f"{_REPOSITORY}[{','.join(extras)}]" if extras else str(_REPOSITORY)
    print("installing the rest", flush=True)
    _run([*pip, "--editable", package])


def _torch_index() -> str | None:
    """The package index for torch; None for pip's own choice."""
    if chosen := os.environ.get("PD_TORCH_INDEX"):
        return chosen
    if _has_nvidia_gpu() or not sys.platform.startswith("linux"):
        return None
    try:
        with urllib.request.urlopen(f"{_CPU_INDEX}/torch/", timeout=_PROBE_TIMEOUT_S):
            return _CPU_INDEX
    except (urllib.error.URLError, OSError):
        return None


def _has_nvidia_gpu() -> bool:
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    listed = subprocess.run([command, "--list-gpus"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU" in listed.stdout


def _takes_cpu_build(command: list[str]) -> bool:
    """Whether pip would install (or has installed) a torch without CUDA."""
    report = ["--dry-run", "--quiet", "--no-deps", "--ignore-installed", "--report", "-"]
    done = subprocess.run([*command, *report], capture_output=True, text=True, check=True)
    (torch,) = json.loads(done.stdout)["install"]
    return "+cpu" in torch["metadata"]["version"] or sys.platform == "darwin"


def _requirement(name: str) -> str:
    """The requirement on `name` as pyproject.toml has it."""
    project = tomllib.loads((_REPOSITORY / "pyproject.toml").read_text())["project"]
    (requirement,) = (each for each in project["dependencies"] if each.startswith(name) and each[len(name)] in "<>=~!")
    return str(requirement)


def _inputs() -> str:
    """A digest of what decides the environment's contents."""
    digest = hashlib.sha256((_REPOSITORY / "pyproject.toml").read_bytes())
    digest.update(f"{sys.version_info[:2]} {os.environ.get('PD_TORCH_INDEX')} {_REPOSITORY}".encode())
    return digest.hexdigest()


def _is_current(stamp: Path, inputs: str, extras: list[str]) -> bool:
    try:
        made = json.loads(stamp.read_text())
    except (OSError, ValueError):
        return False
    return bool(made["inputs"] == inputs and set(extras) <= set(made["extras"]))


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())
