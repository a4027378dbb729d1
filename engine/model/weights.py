"""A checkpoint's tensors by name, read when they are asked for, and a fingerprint of their content.

`SafetensorsFolder` reads Hugging Face folders, in one file or sharded; a GGUF file is `gguf.reader.GgufFile`. Both are
mappings from Hugging Face's names to tensors, which is all a model needs to know of its source.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from engine.model.errors import CheckpointError

_INDEX = "model.safetensors.index.json"
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$|\.attn\.(bias|masked_bias)$")
"""Tensors that old checkpoints carry although every loader computes them."""
_SAMPLES = 256
_SAMPLE_BYTES = 64 << 10


class SafetensorsFolder(Mapping[str, torch.Tensor]):
    """Tensors of a folder's safetensors files. The files stay mapped as long as this object lives.

    Raises `CheckpointError` when a file is missing or damaged, or the index names files that are not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _files_of(folder)
        self._opened: dict[Path, Any] = {}
        self._file_of: dict[str, Path] = {}
        for file in self.files:
            try:
                opened: Any = safe_open(str(file), framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} cannot be read ({error}); copy or download it again") from error
            self._opened[file] = opened
            self._file_of.update(dict.fromkeys(opened.keys(), file))

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._opened[self._file_of[name]].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


class TrackedWeights(Mapping[str, torch.Tensor]):
    """A view of `weights` that remembers which were read, to find those that a model did not know."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        self._weights = weights
        self._read: set[str] = set()

    def unread(self) -> list[str]:
        """Names never read, but for those that can be computed."""
        return sorted(name for name in self._weights if name not in self._read and not _DERIVED.search(name))

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._weights[name]
        self._read.add(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def fingerprint(files: list[Path]) -> str:
    """32 hexadecimal digits that differ between different weights, whatever the files' names and places.

    Hashes each file's size, its first bytes (names, types and shapes) and samples spread evenly over the rest, so that
    a file of any size costs at most 16 MiB of reading.
    """
    digest = xxhash.xxh3_128()
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "big"))
        stride = max(_SAMPLE_BYTES, size // _SAMPLES)
        with file.open("rb") as opened:
            for offset in range(0, size, stride):
                opened.seek(offset)
                digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _files_of(folder: Path) -> list[Path]:
    single = folder / "model.safetensors"
    index = folder / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index} is no index of safetensors files ({error!r}); download it again") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{folder} lacks {', '.join(missing)}, which {_INDEX} names; download them")
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    found = sorted(
        path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf", ".safetensors")
    )
    hint = f"it holds {', '.join(found[:4])}" if found else "it holds no weights"
    raise CheckpointError(
        f"{folder} has neither model.safetensors nor {_INDEX} ({hint}); save the model with "
        "transformers' save_pretrained, or convert a GGUF file with python -m engine.convert"
    )
