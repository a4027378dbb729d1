"""A GGUF file into a Hugging Face folder, once, so that later starts neither read GGUF nor dequantise."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from engine.model.config_fields import DTYPES
from engine.model.gguf.folder import cache_folder, is_converted, locked, replacing
from engine.model.gguf.reader import GgufFile
from engine.model.gguf.tokenizer import build_tokenizer, tokenizer_config


def convert_gguf(
    gguf_path: Path | str,
    out_folder: Path | str,
    *,
    dtype: str = "bfloat16",
    source: str | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Write `config.json`, `model.safetensors`, the tokenizer's files and `generation_config.json` to `out_folder`.

    `source` names the origin in the folder's marker (default: the file's name and size); a folder already made from it
    is left as it is. Raises `UnsupportedGguf`, `FileNotFoundError`, or `FolderTaken` when the folder holds other files.
    """
    gguf_path, out_folder = Path(gguf_path), Path(out_folder)
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if not gguf_path.is_file():
        raise FileNotFoundError(f"there is no GGUF file at {gguf_path}")
    source = source or f"{gguf_path.name} ({gguf_path.stat().st_size} bytes)"
    with locked(out_folder):
        if is_converted(out_folder, source=source, dtype=dtype):
            return out_folder
        file = GgufFile(gguf_path)
        with replacing(out_folder, source=source, dtype=dtype) as folder:
            _write(file, folder, dtype, report)
    report(f"wrote {out_folder}")
    return out_folder


def cached_conversion(gguf_path: Path, *, report: Callable[[str], None] = print) -> Path:
    """The file as a model folder in the user's cache, converted at first use and again when the file has changed.

    For processes that need a folder, tokenizer included, where the user named a GGUF file. Raises as `convert_gguf`.
    """
    resolved = gguf_path.resolve()
    if not resolved.is_file():
        raise FileNotFoundError(f"there is no GGUF file at {gguf_path}")
    place = hashlib.sha256(str(resolved).encode()).hexdigest()[:12]
    state = resolved.stat()
    source = f"{resolved} ({state.st_size} bytes of {state.st_mtime_ns})"
    return convert_gguf(resolved, cache_folder() / f"{resolved.stem}-{place}", source=source, report=report)


def _write(file: GgufFile, folder: Path, dtype: str, report: Callable[[str], None]) -> None:
    report(f"reading the tokenizer of {file.path.name}")
    build_tokenizer(file).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", tokenizer_config(file))
    config = file.config()
    _write_json(folder / "config.json", config | {"dtype": dtype})
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", {k: v for k, v in generation.items() if v is not None})
    report(f"converting {len(file)} tensors to {dtype}")
    tensors = {name: weight.to(DTYPES[dtype]) for name, weight in file.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
