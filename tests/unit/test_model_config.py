"""What a config.json is read as, what is refused by name, and the rotary frequencies of each scaling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.model.config import ModelConfig
from engine.model.decoder_config import Architecture
from engine.model.errors import ConfigError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}


def test_defaults_of_a_short_config() -> None:
    config = ModelConfig.from_hf(LLAMA | {"torch_dtype": "bfloat16", "eos_token_id": [3, 4]})
    assert (config.head_dim, config.num_kv_heads, config.dtype) == (16, 4, torch.bfloat16)
    assert config.eos_token_ids == (3, 4)
    decoder = config.decoder
    assert decoder is not None
    assert decoder.architecture is Architecture.LLAMA
    assert not any((decoder.qk_norm, decoder.qkv_bias, decoder.output_bias, decoder.mlp_bias))
    assert decoder.rope.theta == 10000.0


def test_what_tells_the_architectures_apart() -> None:
    def decoder(name: str, **more: Any) -> Any:
        return ModelConfig.from_hf(LLAMA | {"architectures": [name]} | more).decoder

    assert decoder("LlamaForCausalLM", attention_bias=True).output_bias
    qwen2 = decoder("Qwen2ForCausalLM")
    assert qwen2.qkv_bias
    assert not qwen2.output_bias
    assert decoder("Qwen3ForCausalLM").qk_norm
    moe = decoder(
        "Qwen3MoeForCausalLM",
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
    ).moe
    assert moe.layers == {1}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["Gemma2ForCausalLM"]}, "Gemma2ForCausalLM"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 128}, "sliding_window 128"),
        ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 8}, "sliding_window 8"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ],
)
def test_what_the_native_decoder_lacks_is_named(changes: dict[str, Any], named: str) -> None:
    config = ModelConfig.from_hf(LLAMA | changes)
    assert config.decoder is None
    assert named in config.native_refusal


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["MistralForCausalLM"], "sliding_window": None},
        {"architectures": ["MistralForCausalLM"], "sliding_window": 512},
        {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False, "sliding_window": 8},
    ],
)
def test_a_window_that_hides_nothing_is_accepted(changes: dict[str, Any]) -> None:
    assert ModelConfig.from_hf(LLAMA | changes).decoder is not None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, not 0"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"hidden_size": 66}, "hidden_size 66 is no multiple of num_attention_heads 4"),
        ({"torch_dtype": "int8"}, "'int8'"),
    ],
)
def test_an_impossible_config_is_an_error(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ModelConfig.from_hf(LLAMA | changes)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "attention_factor": 0.9},
        {
            "rope_type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 256,
            "mscale": 0.7,
            "mscale_all_dim": 1.1,
            "truncate": False,
        },
    ],
    ids=lambda scaling: "-".join(str(value) for value in scaling.values()),
)
@pytest.mark.parametrize("old_style", [False, True])
def test_rotary_table_is_transformers(scaling: dict[str, Any], old_style: bool) -> None:
    theirs = LlamaConfig(**(LLAMA | {"rope_parameters": {"rope_theta": 50000.0, **scaling}}))
    ours = {"rope_theta": 50000.0, "rope_scaling": scaling} if old_style else theirs.to_dict()
    decoder = ModelConfig.from_hf(LLAMA | ours).decoder
    assert decoder is not None
    cosine, sine = LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.arange(512)[None])
    half = decoder.rope.head_dim // 2
    expected = torch.cat((cosine[0, :, :half], sine[0, :, :half]), dim=1)
    torch.testing.assert_close(decoder.rope.table(512), expected, atol=5e-5, rtol=0)
