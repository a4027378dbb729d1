"""What every benchmark ends with: tables on the terminal and, on request, a dated Markdown file.

A `Report` collects the full configuration and the tables of one run. `finish` prints it and, with `--write`, stores it
as `results/DATE-NAME.md` together with the machine and the git commit, so that a number can be traced to what
produced it. A second run on the same day gets a number of its own; no result is ever overwritten.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Cell = str | int | float | None
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under named columns. Floats show three significant digits at least; None shows as a dash."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[Cell]] = field(default_factory=list)

    def add(self, *cells: Cell) -> None:
        """Append one row; raises `ValueError` when it has another number of cells than there are columns."""
        if len(cells) != len(self.columns):
            raise ValueError(f"{self.title}: a row of {len(cells)} cells under {len(self.columns)} columns")
        self.rows.append(cells)


@dataclass(frozen=True, kw_only=True)
class Report:
    """One run of one benchmark."""

    name: str
    """Also the end of the result's file name, so letters, digits and dashes only."""
    purpose: str
    """One sentence: what is measured, and against what."""
    configuration: Mapping[str, object]
    tables: Sequence[Table]
    notes: Sequence[str] = ()


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """Give a benchmark's command line the options that `finish` reads."""
    parser.add_argument("--write", action="store_true", help="also write a dated Markdown file")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where --write puts it")


def configuration(options: argparse.Namespace, *, but: Sequence[str] = ()) -> dict[str, object]:
    """What the command line said, without those of `add_report_options` and `but`."""
    return {key: value for key, value in vars(options).items() if key not in ("write", "results", *but)}


def finish(report: Report, options: argparse.Namespace) -> Path | None:
    """Print the report; write it when `--write` was given. Returns the file written, if any."""
    for table in report.tables:
        print(f"\n{table.title}\n{_plain(table)}")
    for note in report.notes:
        print(f"- {note}")
    return write_markdown(report, folder=options.results) if options.write else None


def write_markdown(report: Report, *, folder: Path) -> Path:
    """Write `report` as a new file in `folder` and return its path."""
    now = datetime.datetime.now(datetime.UTC)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"# {report.name}: {now:%Y-%m-%d %H:%M} UTC", "", report.purpose, ""]
    facts = {**machine(), "git commit": git_commit(), **report.configuration}
    lines += [f"- {key}: {_anonymous(str(value))}" for key, value in facts.items()]
    for table in report.tables:
        lines += ["", f"## {table.title}", "", _markdown(table)]
    if report.notes:
        lines += ["", *(f"- {note}" for note in report.notes)]
    number, path = 1, folder / f"{now:%Y-%m-%d}-{report.name}.md"
    while path.exists():
        number += 1
        path = folder / f"{now:%Y-%m-%d}-{report.name}-{number}.md"
    path.write_text("\n".join(lines) + "\n")
    print(f"\nwritten to {path}")
    return path


def _anonymous(value: str) -> str:
    """Without the paths of this machine: a result says nothing of whose it was."""
    for path, name in {sys.executable: "python", str(Path.home()): "~", tempfile.gettempdir(): "$TMPDIR"}.items():
        value = value.replace(path, name)
    return value


def machine() -> dict[str, str]:
    """Processor, cores this process may use, memory, kernel and Python: what a result depends on."""
    processor = platform.processor() or platform.machine()
    memory = "unknown"
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemTotal"):
            memory = f"{int(line.split()[1]) / 2**20:.1f} GiB"
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    return {
        "processor": processor,
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": memory,
        "kernel": f"{platform.system()} {platform.release()}",
        "scheduler autogroups": _autogroups(),
        "huge pages for shared memory": _shared_huge_pages(),
        "python": platform.python_version(),
        "load average at the end (1, 5, 15 min)": load,
    }


def _autogroups() -> str:
    """With them, on two busy cores, a client in a session of its own was seen to wait for seconds for its turn: gaps of
    every stream at once, which no server made."""
    switch = _lines("/proc/sys/kernel/sched_autogroup_enabled")
    return "none" if not switch else "on" if switch[0] == "1" else "off"


def _shared_huge_pages() -> str:
    """What the system lends to a KV pool, which asks for them: with `never`, scattered pages cost a tenth more."""
    for choice in " ".join(_lines("/sys/kernel/mm/transparent_hugepage/shmem_enabled")).split():
        if choice.startswith("["):
            return choice.strip("[]")
    return "none"


def git_commit() -> str:
    """The commit checked out, marked when tracked files differ from it."""
    try:
        commit = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a git checkout)"
    return f"{commit} with uncommitted changes" if changed else commit


def _git(*arguments: str) -> str:
    folder = Path(__file__).parent
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _plain(table: Table) -> str:
    cells = [list(table.columns), *([_text(cell) for cell in row] for row in table.rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(table.columns))]
    lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _markdown(table: Table) -> str:
    lines = [list(table.columns), ["---"] * len(table.columns), *([_text(cell) for cell in row] for row in table.rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}" if abs(cell) < 100 else f"{cell:.1f}"
    return f"{cell:,}" if isinstance(cell, int) else cell
