"""Models outside the Llama family run through transformers over our pages, and what cannot be honoured is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from engine.model.errors import CheckpointError, UnsupportedModelError
from engine.model.loader import load_model
from tests.unit.tiny_models import SIZES, PagedRun, random_sequences, reference_logits, save_random_model

GPT2_SIZES = {"vocab_size": 160, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, "eos_token_id": 2}

CONFIGS = {
    "gpt-neox": transformers.GPTNeoXConfig(**SIZES, rotary_pct=0.5),
    "olmo2": transformers.Olmo2Config(**SIZES, num_key_value_heads=2),
    "phi": transformers.PhiConfig(**SIZES, num_key_value_heads=2),
    "gemma": transformers.GemmaConfig(**SIZES, num_key_value_heads=1, head_dim=32),
    "granite": transformers.GraniteConfig(**SIZES, num_key_value_heads=2, attention_multiplier=0.05),
    "gpt2": transformers.GPT2Config(**GPT2_SIZES),
    "starcoder2": transformers.Starcoder2Config(**SIZES, num_key_value_heads=2),
    "llama-partial-rotary": transformers.GlmConfig(**SIZES, num_key_value_heads=2, head_dim=16),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_the_models_own(name: str, tmp_path: Path) -> None:
    reference = save_random_model(CONFIGS[name], tmp_path)
    ours = load_model(tmp_path, dtype="float32", num_threads=1)
    assert ours.implementation == "transformers"
    sequences = random_sequences([12, 70, 9, 1])
    at_once, in_pieces = PagedRun(ours, sequences), PagedRun(ours, sequences)
    at_once.finish(1000)
    in_pieces.step({0: 3})
    in_pieces.step({0: 1, 1: 17})
    in_pieces.step({1: 40, 0: 1, 2: 4})
    in_pieces.finish(1)
    for index, tokens in enumerate(sequences):
        expected = reference_logits(reference, tokens)
        assert float(expected.std()) > 0.1
        torch.testing.assert_close(at_once.logits[index], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(in_pieces.logits[index], expected, atol=1e-4, rtol=1e-4)


def test_only_the_wanted_rows_are_computed(tmp_path: Path) -> None:
    save_random_model(CONFIGS["gpt-neox"], tmp_path)
    ours = load_model(tmp_path, dtype="float32", num_threads=1)
    assert ours.config.num_kv_heads == 4
    assert ours.config.eos_token_ids == (2,)
    assert ours.kv_spec(16).page_shape == (3, 4, 2, 16, 16)


REFUSED = {
    "sliding window of 32": transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=32),
    "soft-capped": transformers.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=16, sliding_window=512),
    "sliding window of 16": transformers.Gemma3TextConfig(
        **SIZES, num_key_value_heads=2, head_dim=16, sliding_window=16
    ),
    "AttentionInterface": transformers.BloomConfig(vocab_size=160, hidden_size=64, n_layer=2, n_head=4),
    "recurrent": transformers.MambaConfig(vocab_size=160, hidden_size=64, num_hidden_layers=2, state_size=4),
    "ALiBi": transformers.FalconConfig(**{**SIZES, "alibi": True}),
    "dynamic": transformers.GPTNeoXConfig(
        **SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ),
    "attention sinks": transformers.GptOssConfig(
        **SIZES,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["full_attention"] * 3,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "unequal width": transformers.DeepseekV3Config(
        **SIZES,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=3,
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(why: str, tmp_path: Path) -> None:
    save_random_model(REFUSED[why], tmp_path)
    with pytest.raises(UnsupportedModelError, match=why):
        load_model(tmp_path, dtype="float32", num_threads=1)


def test_lacking_weights_are_not_made_up(tmp_path: Path) -> None:
    save_random_model(CONFIGS["olmo2"], tmp_path)
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="q_proj"):
        load_model(tmp_path, dtype="float32", num_threads=1)
