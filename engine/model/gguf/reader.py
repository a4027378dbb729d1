"""One GGUF file seen the Hugging Face way: its config, and its tensors under their Hugging Face names.

Lifecycle: `GgufFile(path)` maps the file and reads its metadata; each tensor is dequantised when it is asked
for, so memory holds one at a time. Supported are the architectures the native decoder runs: `llama` (which
also holds Mistral and SmolLM2), `qwen2`, `qwen3` and `qwen3moe`.

Two things differ from the Hugging Face form and are undone here. Converters to GGUF reorder the rows of Llama's
q and k projections, because ggml's plain rotary embedding pairs neighbours where Hugging Face pairs halves. And
experts lie stacked in one tensor per projection, where Hugging Face stores one matrix for each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize

_CLASSES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
}
_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_EXPERT_NAMES = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_REMEDY = "use the model's safetensors folder instead"
_ROPE_FACTORS = "rope_freqs.weight"
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


class UnsupportedGguf(ValueError):
    """The file holds a model, tensor or setting that cannot be read faithfully; the message names it."""


class GgufFile(Mapping[str, torch.Tensor]):
    """Tensors of the file by Hugging Face name, float32, dequantised at each access.

    Raises `UnsupportedGguf` when the file is damaged, its architecture unknown, or a tensor has no place in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = GGUFReader(str(path))
        except (ValueError, OSError, IndexError) as error:
            raise UnsupportedGguf(f"{path} cannot be read as GGUF ({error}); download it again") from error
        self.architecture = str(self.field("general.architecture"))
        if self.architecture not in _CLASSES:
            raise UnsupportedGguf(
                f"{path} holds architecture {self.architecture!r}, but known are {', '.join(_CLASSES)}; {_REMEDY}"
            )
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self._places = self._find_places()

    def field(self, key: str, default: Any = None) -> Any:
        """A metadata value as a plain Python object, or `default` where the file has none."""
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def config(self) -> dict[str, Any]:
        """What the model's `config.json` would say (without a dtype)."""
        model_type, class_name = _CLASSES[self.architecture]
        hidden, heads = self._hyper("embedding_length"), self._hyper("attention.head_count")
        kv_heads = self._hyper("attention.head_count_kv", heads)
        config: dict[str, Any] = {
            "architectures": [class_name],
            "model_type": model_type,
            "vocab_size": len(self.field("tokenizer.ggml.tokens", ())) or self._hyper("vocab_size"),
            "hidden_size": hidden,
            "intermediate_size": self._hyper("feed_forward_length"),
            "num_hidden_layers": self._hyper("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": self._hyper("attention.key_length", hidden // heads),
            "max_position_embeddings": self._hyper("context_length"),
            "rms_norm_eps": _shortest(self._hyper("attention.layer_norm_rms_epsilon")),
            "rope_theta": _shortest(self._hyper("rope.freq_base", 10000.0)),
            "hidden_act": "silu",
            "attention_bias": "blk.0.attn_q.bias" in self._tensors,
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "bos_token_id": self.field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.eos_token_ids(),
            "pad_token_id": self.field("tokenizer.ggml.padding_token_id"),
        }
        if self.architecture == "qwen3moe":
            config |= {
                "num_experts": self._hyper("expert_count"),
                "num_experts_per_tok": self._hyper("expert_used_count"),
                "moe_intermediate_size": self._hyper("expert_feed_forward_length"),
                "norm_topk_prob": True,  # ggml's Qwen3-MoE graph always renormalises
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            }
        scaling = self._rope_scaling(config)
        if scaling is not None:
            config["rope_scaling"] = scaling
        return config

    def eos_token_ids(self) -> int | list[int] | None:
        """End of sequence, and end of turn where the file names another token for it."""
        ids = [self.field(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
        known = list(dict.fromkeys(int(token) for token in ids if token is not None))
        return known[0] if len(known) == 1 else known or None

    # ---- Mapping ----------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> torch.Tensor:
        stored, expert = self._places[name]
        tensor = self._tensors[stored]
        data = tensor.data if expert is None else tensor.data[expert]
        values = np.ascontiguousarray(dequantize(data, tensor.tensor_type), dtype=np.float32)
        weight = torch.from_numpy(values if values.flags.writeable else values.copy())
        if self.architecture == "llama" and (match := _BLOCK.fullmatch(stored)) and match[2] in ("attn_q", "attn_k"):
            heads = self._hyper("attention.head_count")
            weight = _halves_from_pairs(
                weight, heads if match[2] == "attn_q" else self._hyper("attention.head_count_kv", heads)
            )
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    # ---- inner workings ---------------------------------------------------------------------------------------

    def _hyper(self, key: str, default: Any = None) -> Any:
        value = self.field(f"{self.architecture}.{key}", default)
        if value is None:
            raise UnsupportedGguf(f"{self.path} lacks the metadata field {self.architecture}.{key}")
        return value

    def _find_places(self) -> dict[str, tuple[str, int | None]]:
        """Hugging Face name -> (name in the file, index of the expert in a stacked tensor)."""
        places: dict[str, tuple[str, int | None]] = {}
        for stored, tensor in self._tensors.items():
            if stored == _ROPE_FACTORS:
                continue
            match = _BLOCK.fullmatch(stored)
            top, _, suffix = stored.partition(".")
            if match is None and top in _TOP_NAMES:
                places[f"{_TOP_NAMES[top]}.{suffix}"] = (stored, None)
            elif match is not None and match[2] in _BLOCK_NAMES:
                places[f"model.layers.{match[1]}.{_BLOCK_NAMES[match[2]]}.{match[3]}"] = (stored, None)
            elif match is not None and match[2] in _EXPERT_NAMES:
                for expert in range(int(tensor.shape[2])):
                    name = f"model.layers.{match[1]}.mlp.experts.{expert}.{_EXPERT_NAMES[match[2]]}.{match[3]}"
                    places[name] = (stored, expert)
            else:
                raise UnsupportedGguf(
                    f"{self.path} holds {stored!r}, which has no place in a {self.architecture} model; {_REMEDY}"
                )
        return places

    def _rope_scaling(self, config: dict[str, Any]) -> dict[str, Any] | None:
        kind = self.field(f"{self.architecture}.rope.scaling.type", "none")
        if kind == "linear":
            return {"rope_type": "linear", "factor": self._hyper("rope.scaling.factor")}
        if kind not in ("none", ""):
            raise UnsupportedGguf(
                f"{self.path} scales rotary positions by {kind!r}; use its safetensors folder instead"
            )
        if _ROPE_FACTORS not in self._tensors:
            return None
        return self._llama3_scaling(config)

    def _llama3_scaling(self, config: dict[str, Any]) -> dict[str, Any]:
        """The Llama 3.1 rule whose divisors the file stores one by one; refused where they follow another rule."""
        stored = np.asarray(self._tensors[_ROPE_FACTORS].data, dtype=np.float64)
        scaling = {
            "rope_type": "llama3",
            "factor": float(stored.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        exponents = np.arange(0, config["head_dim"], 2) / config["head_dim"]
        wavelengths = 2 * np.pi * config["rope_theta"] ** exponents
        smooth = np.clip((8192 / wavelengths - 1.0) / (4.0 - 1.0), 0.0, 1.0)
        expected = 1.0 / ((1.0 - smooth) / scaling["factor"] + smooth)
        if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-3):
            raise UnsupportedGguf(
                f"{self.path} has rotary divisors of an unknown rule; use its safetensors folder instead"
            )
        return scaling


def _halves_from_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of `weight [heads * head_dim, ...]` from ggml's order (x0 y0 x1 y1 ...) to (x0 x1 ... y0 y1 ...)."""
    pairs = weight.view(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _shortest(value: float) -> float:
    """The float64 with the fewest digits that is this float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
