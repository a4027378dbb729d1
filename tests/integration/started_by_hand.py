"""`ray start` and `serve run` as a person types them: `python started_by_hand.py CONFIG RAY_PORT FOLDER`.

`ray start` leaves daemons behind, so this program adopts them, says "up" when `serve run` runs, and ends them all when
its standard input is closed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from cluster.process_tree import adopt_orphans, end_descendants


def main(config: str, ray_port: str, folder: str) -> None:
    adopt_orphans()
    programs = Path(sys.executable).parent
    try:
        start = [programs / "ray", "start", "--head", f"--port={ray_port}", "--dashboard-port=0"]
        subprocess.run([*start, f"--temp-dir={folder}", "--disable-usage-stats"], check=True, timeout=120)
        os.environ["RAY_ADDRESS"] = f"127.0.0.1:{ray_port}"
        subprocess.Popen([programs / "serve", "run", config])
        print("up", flush=True)
        sys.stdin.read()
    finally:
        end_descendants()


if __name__ == "__main__":
    main(*sys.argv[1:])
