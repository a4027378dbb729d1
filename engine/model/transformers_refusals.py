"""What a model of the transformers library may ask for that paged causal attention cannot give, told by name.

Checked at load, in three layers: what the config declares, what the model's class is, and (in
`transformers_model.py`) what its attention layers really ask for when they run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.model.errors import UnsupportedModelError

_ROPES_OF_BATCH_LENGTH = ("dynamic", "longrope", "su")
"""Rotary scalings that depend on the longest sequence of the batch, so cached keys of another batch do not fit."""

_LAYER_KINDS = {
    "sliding_attention": "a sliding window",
    "chunked_attention": "chunked attention",
    "linear_attention": "linear attention with recurrent state",
    "compressed_sparse_attention": "sparse attention",
}

_ATTENTION_ARGUMENTS = {
    "sliding_window": "a sliding window",
    "softcap": "soft-capped attention scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a position bias on the scores",
    "indices": "sparse attention",
    "block_indices": "sparse attention",
}


def refuse_by_config(name: str, config: Any) -> None:
    """Raise `UnsupportedModelError` for what `config`, a transformers text config, declares."""
    fields: Mapping[str, Any] = config.to_dict()
    context = fields.get("max_position_embeddings") or getattr(config, "max_position_embeddings", None)
    if fields.get("is_encoder_decoder"):
        raise _refusal(name, "cross attention to an encoder (is_encoder_decoder)")
    window = fields.get("sliding_window")
    kinds = set(fields.get("layer_types") or ())
    windowed = "sliding_attention" in kinds if kinds else fields.get("use_sliding_window", True)
    shortens = window is not None and windowed and (context is None or window < context)
    if shortens:
        raise _refusal(name, f"a sliding window of {window} tokens (context {context})")
    for kind in sorted(kinds - {"full_attention", "sliding_attention"}):
        raise _refusal(name, f"{_LAYER_KINDS.get(kind, 'layers of another kind')} (layer_types: {kind})")
    for field, what in (
        ("attn_logit_softcapping", "soft-capped attention scores"),
        ("attention_chunk_size", "chunked attention"),
        ("alibi", "ALiBi position biases"),
        ("full_attn_mod", "attention of mixed kinds"),
    ):
        if fields.get(field):
            raise _refusal(name, f"{what} ({field} {fields[field]!r})")
    if fields.get("is_causal") is False or fields.get("use_bidirectional_attention"):
        raise _refusal(name, "a mask that is not causal")
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type"))
    if kind in _ROPES_OF_BATCH_LENGTH:
        raise _refusal(name, f"rotary scaling {kind!r}, which depends on the longest sequence of the batch")


def refuse_by_class(name: str, model: Any) -> None:
    """Raise `UnsupportedModelError` for what `model`, a transformers causal language model, is."""
    if getattr(model, "_is_stateful", False):
        raise _refusal(name, "recurrent state beside the KV cache")
    if not getattr(model, "_supports_attention_backend", False):
        raise _refusal(name, "attention of its own that cannot be replaced (no support of AttentionInterface)")


def refuse_by_call(name: str, arguments: Mapping[str, Any], attention_mask: object) -> None:
    """Raise `UnsupportedModelError` for what an attention layer passes along with q, k and v."""
    for argument, what in _ATTENTION_ARGUMENTS.items():
        if arguments.get(argument) is not None:
            raise _refusal(name, f"{what} ({argument})")
    if arguments.get("is_causal") is False:
        raise _refusal(name, "a mask that is not causal (is_causal=False)")
    if attention_mask is not None:
        raise _refusal(name, "an attention mask of its own")


def _refusal(name: str, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{name} needs {what}, which paged attention here does not have; use another model")
