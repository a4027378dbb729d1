"""Makes or refreshes the virtual environment: `python3.11 deploy/install.py [--extras dev,gpu]`. Standard library only.

Nothing is done when the environment was made from the same pyproject.toml, Python and choices, so it costs a second
start no time. torch is the one package with a choice: on a machine without an NVIDIA GPU only its CPU build will do,
which is ten times smaller. PD_TORCH_INDEX names another package index for it, for instance PyTorch's own of CPU builds.
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
from pathlib import Path

_REPOSITORY = Path(__file__).resolve().parent.parent


def main() -> int:
    """0 when the environment is ready, 1 when it could not be made."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=_REPOSITORY / ".venv")
    parser.add_argument("--extras", default="", help="comma-separated extras of pyproject.toml")
    options = parser.parse_args()
    extras = sorted(filter(None, options.extras.split(",")))
    stamp = options.venv / "installed.json"
    inputs = _inputs()
    if _is_current(stamp, inputs, extras):
        return 0
    try:
        _install(options.venv, extras)
    except subprocess.CalledProcessError as error:
        print(f"failed: {' '.join(map(str, error.cmd))}", error.stderr or "", file=sys.stderr)
        return 1
    stamp.write_text(json.dumps({"inputs": inputs, "extras": extras}) + "\n")
    return 0


def _install(venv: Path, extras: list[str]) -> None:
    python = venv / "bin" / "python"
    if not _is_usable(python):
        print(f"making the virtual environment {venv}", flush=True)
        try:
            _run([sys.executable, "-m", "venv", "--clear", str(venv)])
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"{venv} could not be made; Debian and Ubuntu need the package python3-venv") from error
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    torch = _requirement("torch")
    index = os.environ.get("PD_TORCH_INDEX")
    choice = [*(["--index-url", index] if index else []), torch]
    if not _has_nvidia_gpu() and not _takes_cpu_build([*pip, *choice]):
        raise SystemExit(
            f"this machine has no NVIDIA GPU, but pip would install {torch!r} with several GB of CUDA packages; "
            "set PD_TORCH_INDEX to a package index of CPU builds (PyTorch's installation page names one)"
        )
    print(f"installing {torch} from {index or 'the configured package index'}", flush=True)
    _run([*pip, *choice])
    package = f"{_REPOSITORY}[{','.join(extras)}]" if extras else str(_REPOSITORY)
    print("installing the rest", flush=True)
    _run([*pip, "--editable", package])


def _is_usable(python: Path) -> bool:
    """Whether an environment is there, whole (one that was interrupted has no pip), and of this Python's version."""
    if not python.exists():
        return False
    script = "import sys, pip; print(*sys.version_info[:2])"
    asked = subprocess.run([str(python), "-c", script], capture_output=True, text=True, check=False)
    return asked.stdout.split() == [str(number) for number in sys.version_info[:2]]


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
