"""GGUF files written from tiny transformers models, the way converters lay them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ Ġ", "ĠĠ Ġ", "h i"]
TOKENS = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()) + ["ĠĠ", "ĠĠĠ", "hi"]
VOCAB = len(TOKENS)
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_up_proj": "ffn_gate_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}


def in_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order that converters to GGUF give Llama's q and k."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def stored_tensors(model: PreTrainedModel, architecture: str) -> dict[str, np.ndarray]:
    config: Any = model.config
    tensors: dict[str, np.ndarray] = {}
    for name, parameter in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias"):
            stem, kind = name, "weight"
        layer = stem.removeprefix("model.layers.").partition(".")
        inside = layer[2] if stem.startswith("model.layers.") else stem
        prefix = f"blk.{layer[0]}." if stem.startswith("model.layers.") else ""
        value = parameter.numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if architecture == "llama" and inside in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config.num_attention_heads if "q_proj" in inside else config.num_key_value_heads
            value = in_pairs(value, heads)
        if NAMES[inside] == "ffn_gate_up_exps":
            gate, up = np.split(value, 2, axis=1)
            tensors |= {f"{prefix}ffn_gate_exps.{kind}": gate, f"{prefix}ffn_up_exps.{kind}": up}
        else:
            tensors[f"{prefix}{NAMES[inside]}.{kind}"] = value
    return tensors


def write_gguf(path: Path, model: PreTrainedModel, architecture: str, **changes: Any) -> Path:
    config: Any = model.config
    writer = gguf.GGUFWriter(path, changes.pop("declared", architecture))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(getattr(config, "head_dim", config.hidden_size // config.num_attention_heads))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if architecture == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if changes.pop("sentencepiece", False):
        add_sentencepiece(writer)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(changes.pop("pre", "smollm"))
        writer.add_token_list(TOKENS)
        writer.add_token_merges(MERGES)
        writer.add_token_types([3] * 3 + [1] * (VOCAB - 3))
        writer.add_add_bos_token(changes.pop("add_bos", False))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    for name, value in (stored_tensors(model, architecture) | changes.pop("tensors", {})).items():
        if name == "blk.0.ffn_down.weight":
            packed = gguf.quantize(value, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, np.ascontiguousarray(value))
    assert not changes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def round_as_stored(model: PreTrainedModel) -> None:
    """Give the model the rounded values of the one tensor that `write_gguf` quantises."""
    with torch.no_grad():
        weight = model.get_parameter("model.layers.0.mlp.down_proj.weight")
        packed = gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
        weight.copy_(torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)))


def add_sentencepiece(writer: gguf.GGUFWriter) -> None:
    """`▁hi` grows out of its letters by the scores; everything else falls back to bytes."""
    pieces = ["▁", "h", "i", "▁h", "▁hi"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces])
    writer.add_token_scores([0.0] * 259 + [-10.0, -9.0, -8.0, -1.0, -2.0])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(pieces))
    writer.add_unk_token_id(0)
