"""Typed reading of a checkpoint's config.json. Raises `ConfigError`, which names the field and what was there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from engine.model.errors import ConfigError

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

_ARCHITECTURE_OF_TYPE = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
"""The class names that go with `model_type`, for files that name none."""


class ConfigFields:
    """The values of a config mapping by name; one that is null counts as missing."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def get(self, name: str, default: Any = None) -> Any:
        """As it stands in the file."""
        value = self._values.get(name)
        return default if value is None else value

    def optional_positive(self, name: str) -> int | None:
        """A positive integer, or None where it is missing."""
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ConfigError(f"config.json: {name} must be a positive integer, not {value!r}")
        return value

    def positive(self, name: str) -> int:
        """A positive integer."""
        value = self.optional_positive(name)
        if value is None:
            raise ConfigError(f"config.json: {name} is missing")
        return value

    def architecture_name(self) -> str:
        """The class of the model, or its `model_type` where that is not known."""
        names = self.get("architectures") or []
        if names:
            return str(names[0])
        model_type = str(self.get("model_type", "unknown"))
        return _ARCHITECTURE_OF_TYPE.get(model_type, model_type)

    def dtype(self) -> torch.dtype:
        """Of the weights; float32 where the file does not say."""
        value = self.get("dtype", self.get("torch_dtype", "float32"))
        if isinstance(value, torch.dtype):
            return value
        name = str(value).removeprefix("torch.")
        if name not in DTYPES:
            raise ConfigError(f"config.json: dtype {name!r} is none of {', '.join(DTYPES)}")
        return DTYPES[name]
