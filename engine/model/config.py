"""What a checkpoint's config.json says, checked once and frozen.

`ModelConfig` holds what every part of the engine needs to know of any model. `DecoderConfig` holds what the native
decoder needs besides; it exists only for architectures of the Llama family whose every feature the decoder honours,
and `ModelConfig.native_refusal` says by name why it does not. Reads plain mappings, so that no transformers import
is needed to start.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from engine.model.errors import ConfigError, UnsupportedModelError
from engine.model.rope import RopeConfig

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


class Architecture(enum.Enum):
    """Architectures the native decoder knows; the value is the class name in config.json."""

    LLAMA = "LlamaForCausalLM"
    MISTRAL = "MistralForCausalLM"
    QWEN2 = "Qwen2ForCausalLM"
    QWEN3 = "Qwen3ForCausalLM"
    QWEN3_MOE = "Qwen3MoeForCausalLM"


_ARCHITECTURE_OF_TYPE = {
    "llama": Architecture.LLAMA,
    "mistral": Architecture.MISTRAL,
    "qwen2": Architecture.QWEN2,
    "qwen3": Architecture.QWEN3,
    "qwen3_moe": Architecture.QWEN3_MOE,
}


class HasToDict(Protocol):
    """A transformers config object."""

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Mixture-of-experts feed-forward of the layers in `layers`; the others are dense."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    normalise_weights: bool
    """Whether the chosen experts' router probabilities are divided by their sum."""
    layers: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What distinguishes one native decoder from another."""

    architecture: Architecture
    intermediate_size: int
    rms_norm_eps: float
    rope: RopeConfig
    tied_embeddings: bool
    qk_norm: bool
    """RMS norm over each head of q and k before the rotary embedding (Qwen3)."""
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    moe: MoeConfig | None


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
    bos_token_id: int | None
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
        fields = _Fields(config if isinstance(config, Mapping) else config.to_dict())
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
            decoder = _decoder_config(fields, head_dim)
        except UnsupportedModelError as error:
            refusal = str(error)
        eos = fields.get("eos_token_id")
        bos = fields.get("bos_token_id")
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
            bos_token_id=bos if isinstance(bos, int) else None,
            dtype=dtype or fields.dtype(),
            model_id=model_id,
            decoder=decoder,
            native_refusal=refusal,
        )


class _Fields:
    """Typed reading of a config mapping."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def get(self, name: str, default: Any = None) -> Any:
        value = self._values.get(name)
        return default if value is None else value

    def optional_positive(self, name: str) -> int | None:
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ConfigError(f"config.json: {name} must be a positive integer, not {value!r}")
        return value

    def positive(self, name: str) -> int:
        value = self.optional_positive(name)
        if value is None:
            raise ConfigError(f"config.json: {name} is missing")
        return value

    def architecture_name(self) -> str:
        names = self.get("architectures") or []
        if names:
            return str(names[0])
        known = _ARCHITECTURE_OF_TYPE.get(str(self.get("model_type", "")))
        return known.value if known else str(self.get("model_type", "unknown"))

    def dtype(self) -> torch.dtype:
        value = self.get("dtype", self.get("torch_dtype", "float32"))
        if isinstance(value, torch.dtype):
            return value
        name = str(value).removeprefix("torch.")
        if name not in DTYPES:
            raise ConfigError(f"config.json: dtype {name!r} is none of {', '.join(DTYPES)}")
        return DTYPES[name]


def _decoder_config(fields: _Fields, head_dim: int) -> DecoderConfig:
    """Raises `UnsupportedModelError` for anything the native decoder would have to ignore."""
    name = fields.architecture_name()
    try:
        architecture = Architecture(name)
    except ValueError:
        known = ", ".join(a.value for a in Architecture)
        raise UnsupportedModelError(f"architecture {name} is none of the native decoder's ({known})") from None
    activation = fields.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModelError(f"{name}: activation {activation!r}, the native decoder has silu only")
    _refuse_sliding_window(fields, architecture)
    _refuse_quantised(fields, name)
    rope = RopeConfig.from_hf(
        parameters=fields.get("rope_parameters") or fields.get("rope_scaling") or {},
        theta=float(fields.get("rope_theta", 10000.0)),
        partial_rotary_factor=float(fields.get("partial_rotary_factor", 1.0)),
        head_dim=head_dim,
        max_position_embeddings=fields.positive("max_position_embeddings"),
    )
    attention_bias = bool(fields.get("attention_bias", False))
    is_qwen2 = architecture is Architecture.QWEN2
    return DecoderConfig(
        architecture=architecture,
        intermediate_size=fields.positive("intermediate_size"),
        rms_norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
        rope=rope,
        tied_embeddings=bool(fields.get("tie_word_embeddings", False)),
        qk_norm=architecture in (Architecture.QWEN3, Architecture.QWEN3_MOE),
        qkv_bias=is_qwen2 or attention_bias,
        output_bias=attention_bias and not is_qwen2,
        mlp_bias=bool(fields.get("mlp_bias", False)) and architecture is Architecture.LLAMA,
        moe=_moe_config(fields) if architecture is Architecture.QWEN3_MOE else None,
    )


def _refuse_sliding_window(fields: _Fields, architecture: Architecture) -> None:
    """A window at least as long as the context changes nothing and is accepted."""
    window = fields.get("sliding_window")
    if architecture is Architecture.LLAMA or window is None:
        return
    if architecture is not Architecture.MISTRAL and not fields.get("use_sliding_window", False):
        return
    context = fields.positive("max_position_embeddings")
    if window < context:
        raise UnsupportedModelError(
            f"{architecture.value}: sliding_window {window} is shorter than max_position_embeddings {context}, and the "
            f"native decoder has full attention only; serve it with max_position_embeddings set to {window}"
        )


def _refuse_quantised(fields: _Fields, name: str) -> None:
    quantisation = fields.get("quantization_config")
    if quantisation is not None:
        method = quantisation.get("quant_method", "?") if isinstance(quantisation, Mapping) else "?"
        raise UnsupportedModelError(f"{name}: weights quantised by {method!r}, the native decoder has none")


def _moe_config(fields: _Fields) -> MoeConfig:
    step = fields.optional_positive("decoder_sparse_step") or 1
    dense = set(fields.get("mlp_only_layers", []))
    num_experts = fields.optional_positive("num_experts") or fields.positive("num_local_experts")
    per_token = fields.positive("num_experts_per_tok")
    if per_token > num_experts:
        raise ConfigError(f"config.json: num_experts_per_tok {per_token} is more than num_experts {num_experts}")
    layers = range(fields.positive("num_hidden_layers"))
    return MoeConfig(
        num_experts=num_experts,
        experts_per_token=per_token,
        intermediate_size=fields.positive("moe_intermediate_size"),
        normalise_weights=bool(fields.get("norm_topk_prob", False)),
        layers=frozenset(i for i in layers if i not in dense and (i + 1) % step == 0),
    )
