"""The elementwise kernels and the fused decoder against plain torch operations."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from engine.batch import Batch, Piece, pack_batch
from engine.kernels.jit import JitKernels
from engine.kernels.native import NativeKernels
from engine.kernels.plain import PlainKernels
from engine.kv_spec import KVCacheSpec, KVPool
from engine.model.config import ModelConfig
from engine.model.errors import ConfigError, UnsupportedModelError
from engine.model.fused import FusedDecoder
from engine.model.layered import LayeredDecoder
from engine.model.native import NativeDecoder

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAGE_SIZE = 4


def normal(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 576), (3, 16), (70, 515), (5, 7), (0, 64)])
@pytest.mark.parametrize("with_update", [True, False])
def test_add_rms_norm(dtype: torch.dtype, rows: int, width: int, with_update: bool) -> None:
    x = normal(rows, width, dtype=dtype, seed=1) if with_update else None
    weight = normal(width, dtype=dtype, seed=2)
    results = []
    for kernels in (NativeKernels(num_threads=2), PlainKernels()):
        residual, out = normal(rows, width, dtype=dtype), torch.empty((rows, width), dtype=dtype)
        kernels.add_rms_norm(x, residual, weight, out, 1e-5)
        results.append((residual, out))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1536), (3, 16), (40, 1003), (5, 7)])
def test_silu_mul(dtype: torch.dtype, rows: int, width: int) -> None:
    gate_up = 20 * normal(rows, 2 * width, dtype=dtype)
    outs = []
    for kernels in (NativeKernels(num_threads=2), PlainKernels()):
        out = torch.empty((rows, width), dtype=dtype)
        kernels.silu_mul(gate_up, out)
        outs.append(out)
    torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=torch.finfo(dtype).eps)


# ---- the decoder --------------------------------------------------------------------------------------------------

SIZES = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 72,
    "intermediate_size": 150,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 203,
    "max_position_embeddings": 64,
    "attention_bias": True,
    "mlp_bias": True,
}
"""Nothing a multiple of the kernels' panels of 32 outputs, and every bias there is."""


def make_config(dtype: torch.dtype, **changes: object) -> ModelConfig:
    return ModelConfig.from_hf(SIZES | changes, dtype=dtype)


def make_weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    hidden, inter, head_dim = config.hidden_size, SIZES["intermediate_size"], config.head_dim
    assert isinstance(inter, int)
    q, kv = config.num_heads * head_dim, config.num_kv_heads * head_dim
    shapes = {"model.embed_tokens": (config.vocab_size, hidden), "lm_head": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{name}_proj": (size, hidden) for name, size in (("q", q), ("k", kv), ("v", kv))}
        shapes |= {f"{at}.self_attn.o_proj": (hidden, q), f"{at}.mlp.down_proj": (hidden, inter)}
        shapes |= {f"{at}.mlp.{name}_proj": (inter, hidden) for name in ("gate", "up")}
    weights = {}
    for seed, (name, (outputs, inputs)) in enumerate(shapes.items()):
        weights[f"{name}.weight"] = normal(outputs, inputs, seed=seed) * inputs**-0.5
        weights[f"{name}.bias"] = normal(outputs, seed=1000 + seed) * 0.2
    norms = ["model.norm"]
    for layer in range(config.num_layers):
        norms += [f"model.layers.{layer}.{name}_layernorm" for name in ("input", "post_attention")]
    return weights | {f"{name}.weight": normal(hidden, seed=2000 + i) * 0.2 + 1 for i, name in enumerate(norms)}


def make_pool(config: ModelConfig) -> KVPool:
    spec = KVCacheSpec(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        page_size=PAGE_SIZE,
        dtype=config.dtype,
    )
    return KVPool(spec=spec, num_pages=40)


def make_batch(spans: Mapping[int, tuple[int, int]], *, wanted: bool = True) -> Batch:
    """Each sequence's tokens `start` up to `end`; sequence `i` has pages 10 i up to 10 i + 9 in a mixed order."""
    pieces = []
    for sequence, (start, end) in spans.items():
        tokens = np.random.default_rng(sequence).integers(0, 203, 40)
        pages = np.random.default_rng(sequence).permutation(np.arange(10 * sequence, 10 * sequence + 10))
        pieces.append(Piece(tokens, pages.astype(np.int32), start, end, wanted))
    return pack_batch(pieces, page_size=PAGE_SIZE)


STEPS: list[dict[int, tuple[int, int]]] = [
    {0: (0, 23), 1: (0, 1)},
    {0: (23, 24), 1: (1, 14), 2: (0, 30)},
    {0: (24, 25), 1: (14, 15), 2: (30, 31), 3: (0, 5)},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_fused_decoder_gives_the_layers_logits(dtype: torch.dtype, tied: bool, num_threads: int) -> None:
    config = make_config(dtype, tie_word_embeddings=tied)
    weights = make_weights(config)
    fused = NativeDecoder(config, weights, num_threads=num_threads)
    layered = NativeDecoder(config, weights, num_threads=1, kernels=PlainKernels())
    pools = make_pool(config), make_pool(config)
    assert isinstance(fused._body, FusedDecoder)
    assert isinstance(layered._body, LayeredDecoder)
    for spans in STEPS:
        batch = make_batch(spans)
        ours, theirs = fused.forward(batch, pools[0]), layered.forward(batch, pools[1])
        assert ours.dtype is torch.float32
        assert ours.shape == (len(spans), 203)
        torch.testing.assert_close(ours, theirs, atol=3e-5 if dtype is torch.float32 else 0.1, rtol=0)


@pytest.mark.parametrize("kernels", [NativeKernels(num_threads=2), JitKernels(num_threads=2)], ids=lambda k: k.name)
def test_layered_decoder_in_half_precision(kernels: NativeKernels | JitKernels) -> None:
    config = make_config(torch.float16)
    weights = make_weights(config)
    ours = NativeDecoder(config, weights, num_threads=2, kernels=kernels)
    exact = NativeDecoder(make_config(torch.float32), weights, num_threads=2)
    assert isinstance(ours._body, LayeredDecoder)
    pools = make_pool(config), make_pool(exact.config)
    for spans in STEPS:
        batch = make_batch(spans)
        torch.testing.assert_close(ours.forward(batch, pools[0]), exact.forward(batch, pools[1]), atol=0.03, rtol=0)


@pytest.mark.parametrize("kernels", [NativeKernels(num_threads=2), PlainKernels()], ids=lambda k: k.name)
def test_a_chunk_without_wanted_logits_only_writes_pages(kernels: NativeKernels | PlainKernels) -> None:
    config = make_config(torch.float32)
    weights = make_weights(config)
    decoder = NativeDecoder(config, weights, num_threads=2, kernels=kernels)
    chunked, whole = make_pool(config), make_pool(config)
    assert decoder.forward(make_batch({0: (0, 17)}, wanted=False), chunked).shape == (0, 203)
    last = decoder.forward(make_batch({0: (17, 30)}), chunked)
    torch.testing.assert_close(last, decoder.forward(make_batch({0: (0, 30)}), whole), atol=2e-5, rtol=0)
    torch.testing.assert_close(chunked.data, whole.data, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_has_the_same_logits_in_any_company(dtype: torch.dtype) -> None:
    """To the last bit: alone, among others, in chunks, token by token, on any number of threads."""
    config = make_config(dtype, max_position_embeddings=1024)
    weights = make_weights(config)
    tokens = np.random.default_rng(7).integers(0, 203, 700)

    def last_logits(num_threads: int, cuts: list[int], company: tuple[tuple[int, int], ...] = ()) -> torch.Tensor:
        decoder = NativeDecoder(config, weights, num_threads=num_threads)
        spec = KVCacheSpec(num_layers=2, num_kv_heads=2, head_dim=24, page_size=16, dtype=dtype)
        pool = KVPool(spec=spec, num_pages=100)
        pages = np.random.default_rng(num_threads).permutation(100).astype(np.int32)
        for start, end in itertools.pairwise(cuts):
            pieces = [Piece(tokens, pages, start, end, True)]
            for index, span in enumerate(company):
                pieces.append(Piece(tokens[::-1].copy(), pages[44 + 10 * index :], *span, True))
            logits = decoder.forward(pack_batch(pieces, page_size=16), pool)
        return logits[0]

    whole = last_logits(1, [0, 700])
    assert torch.equal(last_logits(3, [0, 700]), whole)
    assert torch.equal(last_logits(2, [0, 13, 301, 302, 690, *range(691, 701)]), whole)
    assert torch.equal(last_logits(2, [0, 509, 699, 700], ((0, 33), (70, 71), (100, 117))), whole)


def test_a_missing_or_misshapen_tensor_is_named() -> None:
    config = make_config(torch.float32)
    weights = make_weights(config)
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        NativeDecoder(config, {k: v for k, v in weights.items() if k != name}, num_threads=1)
    with pytest.raises(ConfigError, match=r"up_proj.*\(3, 72\).*\(150, 72\)"):
        NativeDecoder(config, weights | {name: torch.zeros(3, 72)}, num_threads=1)


def test_a_config_the_decoder_does_not_honour_is_refused() -> None:
    config = make_config(torch.float32, hidden_act="gelu")
    with pytest.raises(UnsupportedModelError, match="gelu"):
        NativeDecoder(config, {}, num_threads=1)
