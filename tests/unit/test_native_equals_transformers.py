"""The native decoder gives transformers' logits: tiny random models of each family, alone, batched and in chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from engine.model.loader import LoadedModel, load_model
from tests.unit.tiny_models import SIZES, PagedRun, random_sequences, reference_logits, save_random_model

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
_MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32}


def _sized(kind: type[PretrainedConfig], **more: Any) -> PretrainedConfig:
    return kind(**(SIZES | more))


CONFIGS = {
    "llama": _sized(LlamaConfig, num_key_value_heads=2, tie_word_embeddings=True),
    "llama-untied-biased": _sized(LlamaConfig, num_key_value_heads=4, attention_bias=True, mlp_bias=True),
    "llama3-rope": _sized(LlamaConfig, num_key_value_heads=1, rope_parameters=_LLAMA3_ROPE),
    "yarn-rope": _sized(LlamaConfig, num_key_value_heads=2, rope_parameters=_YARN),
    "linear-rope": _sized(LlamaConfig, num_key_value_heads=2, rope_parameters=_LINEAR),
    "mistral": _sized(MistralConfig, num_key_value_heads=2, head_dim=32, sliding_window=None),
    "qwen2": _sized(Qwen2Config, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": _sized(Qwen3Config, num_key_value_heads=2, head_dim=32),
    "qwen3-moe": _sized(Qwen3MoeConfig, num_key_value_heads=2, norm_topk_prob=True, **_MOE),
    "qwen3-moe-mixed": _sized(Qwen3MoeConfig, num_key_value_heads=2, mlp_only_layers=[1], **_MOE),
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedModel, LoadedModel]:
    folder: Path = tmp_path_factory.mktemp(request.param)
    reference = save_random_model(CONFIGS[request.param], folder)
    ours = load_model(folder, dtype="float32", num_threads=1)
    assert ours.implementation == "native"
    return reference, ours


def assert_equal(reference: PreTrainedModel, run: PagedRun, sequences: list[list[int]]) -> None:
    for tokens, logits in zip(sequences, run.logits, strict=True):
        expected = reference_logits(reference, tokens)
        assert float(expected.std()) > 0.3  # otherwise the tolerance would say nothing
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 4, 33, 130])
def test_one_sequence_at_once(pair: tuple[PreTrainedModel, LoadedModel], length: int) -> None:
    sequences = random_sequences([length], seed=length)
    run = PagedRun(pair[1], sequences)
    run.finish(1000)
    assert_equal(pair[0], run, sequences)


def test_several_sequences_in_one_batch(pair: tuple[PreTrainedModel, LoadedModel]) -> None:
    sequences = random_sequences([7, 1, 20, 64])
    run = PagedRun(pair[1], sequences)
    run.finish(1000)
    assert_equal(pair[0], run, sequences)


def test_chunks_beside_single_tokens(pair: tuple[PreTrainedModel, LoadedModel]) -> None:
    sequences = random_sequences([12, 70, 9])
    run = PagedRun(pair[1], sequences)
    run.step({0: 3})
    run.step({0: 1, 1: 17})
    run.step({1: 5, 0: 1, 2: 4})
    run.finish(1)
    assert_equal(pair[0], run, sequences)
