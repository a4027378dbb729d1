"""The C++ kernel, numba and torch choose the same tokens, whatever the filters, ties, infinities and thread counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from engine.grammar.filling import RowMasks
from engine.sampling import Sampler, SampleRow
from engine.sampling.choose import TorchChooser
from engine.sampling.jit import JitChooser
from engine.sampling.kernel import KernelChooser
from engine.sampling.sampler import _choice_of
from native.compiler import NativeUnavailable
from protocol.sampling import SamplingParams


@pytest.fixture(scope="module")
def kernel() -> KernelChooser:
    try:
        return KernelChooser(num_threads=2)
    except NativeUnavailable as error:
        pytest.skip(str(error))


def random_logits(rows: int, *, vocab: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator) * scale


def row(params: SamplingParams, *, position: int = 0) -> SampleRow:
    return SampleRow(params=params, prompt=[1, 2, 3], generated=[0] * position)


def mixed_params(rng: np.random.Generator) -> SamplingParams:
    return SamplingParams(
        seed=int(rng.integers(0, 2**63)),
        temperature=float(rng.choice([0.0, 0.2, 1.0, 1.0, 1.5, 8.0])),
        top_k=int(rng.choice([0, 0, 1, 7, 50, 5000])),
        top_p=float(rng.choice([1.0, 1.0, 0.0, 0.4, 0.9, 0.9999])),
        min_p=float(rng.choice([0.0, 0.0, 0.02, 0.5, 1.0])),
    )


@pytest.mark.parametrize("vocab", [1, 15, 16, 500, 513, 4099])
def test_all_choosers_choose_the_same(kernel: KernelChooser, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    for scale in (0.1, 3.0, 30.0):
        logits = random_logits(40, vocab=vocab, seed=vocab, scale=scale)
        logits[1::4] = logits[1::4].round()  # many ties
        logits[2::4, : vocab // 2] = -math.inf
        logits[3, 0] = math.nan
        params = [mixed_params(rng) for _ in range(40)]
        params[3] = SamplingParams(seed=1, top_k=3)
        chosen = []
        for chooser in (kernel, TorchChooser(), JitChooser()):
            rows = [row(p) for p in params]
            good = [i for i in range(40) if bool(torch.isfinite(logits[i]).any())]
            sampled = Sampler(chooser=chooser).sample(logits[good].clone(), [rows[i] for i in good])
            chosen.append([s.token for s in sampled])
        assert chosen[0] == chosen[1] == chosen[2]


@pytest.mark.parametrize("vocab", [1, 15, 16, 500, 4099])
@pytest.mark.parametrize("count", [0, 1, 5, 40])
def test_kernel_and_torch_find_the_same_likeliest(kernel: KernelChooser, vocab: int, count: int) -> None:
    logits = random_logits(12, vocab=vocab, scale=4.0)
    logits[1::3] = logits[1::3].round()  # ties
    logits[2, : vocab // 2] = -math.inf
    logits[5, 0] = math.nan
    logits[8] = -math.inf
    logits[8, -1] = 0.5
    one, other = (chooser.likeliest(logits, min(count, vocab)) for chooser in (kernel, TorchChooser()))
    good = np.isfinite(other.log_sums)
    assert np.array_equal(one.logits[good], other.logits[good])
    untied = [0, 3, 6, 9, 8]  # among ties the kernel takes the lowest, torch any
    assert np.array_equal(one.tokens[untied], other.tokens[untied])
    np.testing.assert_allclose(one.log_sums[good], other.log_sums[good], rtol=1e-6, atol=1e-6)


def test_a_wide_nucleus_is_cut_exactly(kernel: KernelChooser) -> None:
    """Thousands of tokens in the nucleus, so that the kernel selects by halves instead of sorting."""
    logits = random_logits(4, vocab=20_000, scale=1.0)
    params = [SamplingParams(seed=i, top_p=p, temperature=2.0) for i, p in enumerate((0.5, 0.8, 0.95, 0.999))]
    torch_sampler, kernel_sampler = Sampler(chooser=TorchChooser()), Sampler(chooser=kernel)
    jit_sampler = Sampler(chooser=JitChooser())
    for position in range(30):
        rows = [row(p, position=position) for p in params]
        expected = torch_sampler.sample(logits.clone(), rows)
        assert kernel_sampler.sample(logits.clone(), rows) == expected
        assert jit_sampler.sample(logits.clone(), rows) == expected


def test_the_kernel_chooses_alike_with_any_number_of_threads(kernel: KernelChooser) -> None:
    logits = random_logits(33, vocab=3000)
    rng = np.random.default_rng(0)
    rows = [row(mixed_params(rng)) for _ in range(33)]
    alone = Sampler(chooser=KernelChooser(num_threads=1))
    assert alone.sample(logits.clone(), rows) == Sampler(chooser=kernel).sample(logits.clone(), rows)


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 513, 4099])
def test_all_choosers_mask_the_same(kernel: KernelChooser, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    words = rng.integers(-(2**31), 2**31, (4, -(-vocab // 32)), dtype=np.int64).astype(np.int32)
    words[0], words[1] = -1, 0
    masked = [5, 0, 2, 3]
    masks = RowMasks.of(masked, torch.from_numpy(words))
    logits = random_logits(6, vocab=vocab, seed=vocab)
    logits[2, 0] = math.nan
    expected = logits.clone()
    for row_bits, index in zip(words, masked, strict=True):
        allowed = np.unpackbits(row_bits.view(np.uint8), bitorder="little")[:vocab].astype(bool)
        expected[index, torch.from_numpy(~allowed)] = -math.inf
    for _ in range(20):
        params = [mixed_params(rng) for _ in range(6)]
        choice = _choice_of([row(each) for each in params], vocab)
        tokens = TorchChooser().choose(expected.clone(), choice).tolist()
        assert tokens[0] == -1, "its mask leaves nothing"
        for chooser in (kernel, TorchChooser(), JitChooser()):
            assert chooser.choose(logits.clone(), choice, masks).tolist() == tokens
