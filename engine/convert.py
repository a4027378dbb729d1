"""Convert a GGUF file to a model folder: `python -m engine.convert --gguf FILE --out FOLDER`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine.model.gguf.convert import convert_gguf


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m engine.convert", description=__doc__)
    parser.add_argument("--gguf", type=Path, required=True, help="the file to read")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    options = parser.parse_args()
    try:
        convert_gguf(options.gguf, options.out, dtype=options.dtype)
    except (ValueError, OSError) as error:
        print(f"cannot convert: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
