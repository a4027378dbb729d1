"""What the native decoder needs to know of a model besides what every part of the engine does, or why it does not fit.

A `DecoderConfig` exists only for architectures of the Llama family whose every feature the decoder honours.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from engine.model.config_fields import ConfigFields
from engine.model.errors import ConfigError, UnsupportedModelError
from engine.model.rope import RopeConfig


class Architecture(enum.Enum):
    """Architectures the native decoder knows; the value is the class name in config.json."""

    LLAMA = "LlamaForCausalLM"
    MISTRAL = "MistralForCausalLM"
    QWEN2 = "Qwen2ForCausalLM"
    QWEN3 = "Qwen3ForCausalLM"
    QWEN3_MOE = "Qwen3MoeForCausalLM"


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


def decoder_config(fields: ConfigFields, head_dim: int) -> DecoderConfig:
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


def _refuse_sliding_window(fields: ConfigFields, architecture: Architecture) -> None:
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


def _refuse_quantised(fields: ConfigFields, name: str) -> None:
    quantisation = fields.get("quantization_config")
    if quantisation is not None:
        method = quantisation.get("quant_method", "?") if isinstance(quantisation, Mapping) else "?"
        raise UnsupportedModelError(f"{name}: weights quantised by {method!r}, the native decoder has none")


def _moe_config(fields: ConfigFields) -> MoeConfig:
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
