"""What a checkpoint's config.json says, checked once and frozen.

`ModelConfig` holds what every part of the engine needs to know of any model; `decoder_config.py` has what the native
decoder needs besides, and `ModelConfig.native_refusal` says by name why there is none. Reads plain mappings, so that no
transformers import is needed to start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from engine.model.config_fields import ConfigFields
from engine.model.decoder_config import DecoderConfig, decoder_config
from engine.model.errors import ConfigError, UnsupportedModelError


class HasToDict(Protocol):
    """A transformers config object."""

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A causal language model as the engine sees it. `num_*_heads` are of the whole model."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype
    model_id: str = ""
    """Fingerprint of the weights, set by the loader: equal ids produce interchangeable KV."""
    decoder: DecoderConfig | None = None
    """None when this model runs through transformers."""
    native_refusal: str = ""
    """Why `decoder` is None."""

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any] | HasToDict, *, dtype: torch.dtype | None = None, model_id: str = ""
    ) -> ModelConfig:
        """From config.json's content or a transformers config object.

        `dtype` overrides the checkpoint's own. Raises `ConfigError` naming the field that is missing or impossible.
        """
        fields = ConfigFields(config if isinstance(config, Mapping) else config.to_dict())
        num_heads = fields.positive("num_attention_heads")
        hidden_size = fields.positive("hidden_size")
        head_dim = fields.optional_positive("head_dim")
        if head_dim is None:
            if hidden_size % num_heads:
                raise ConfigError(
                    f"config.json: hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads}; "
                    "set head_dim if that is meant"
                )
            head_dim = hidden_size // num_heads
        num_kv_heads = fields.optional_positive("num_key_value_heads") or num_heads
        if num_heads % num_kv_heads:
            raise ConfigError(
                f"config.json: num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}"
            )
        decoder: DecoderConfig | None = None
        refusal = ""
        try:
            decoder = decoder_config(fields, head_dim)
        except UnsupportedModelError as error:
            refusal = str(error)
        eos = fields.get("eos_token_id")
        return cls(
            architecture=fields.architecture_name(),
            num_layers=fields.positive("num_hidden_layers"),
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            vocab_size=fields.positive("vocab_size"),
            max_position_embeddings=fields.positive("max_position_embeddings"),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (int(eos),),
            dtype=dtype or fields.dtype(),
            model_id=model_id,
            decoder=decoder,
            native_refusal=refusal,
        )
