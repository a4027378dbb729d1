"""The fast attention backends against the plain one: every type, odd shapes, mixed batches, split ranges of keys."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from engine.attention.flashinfer import page_lists
from engine.attention.native import NativeAttention
from engine.attention.plain import PlainAttention
from engine.kernels.build import SOURCES, loaded_openmp_runtime
from engine.kernels.interface import Kernels
from engine.kernels.jit import JitKernels
from engine.kernels.native import NativeKernels
from tests.unit.attention_cases import Case, make_inputs

CASES = {
    "mixed": Case(spans=[(0, 100), (500, 501), (77, 133), (0, 1), (64, 128)]),
    "one long stream": Case(spans=[(1999, 2000)]),
    "chunk after a long prefix": Case(spans=[(1200, 1300)]),
    "chunk across a section of keys": Case(spans=[(301, 900)]),
    "whole prompt": Case(spans=[(0, 700)]),
    "norms": Case(spans=[(0, 40), (50, 51)], num_heads=4, num_kv_heads=2, normed=True),
    "padded head, odd pages": Case(
        spans=[(0, 70), (50, 51)], num_heads=4, num_kv_heads=1, head_dim=80, page_size=5, normed=True
    ),
    "tiny head": Case(spans=[(0, 30), (9, 10)], num_heads=4, num_kv_heads=2, head_dim=8),
    "no rotation": Case(spans=[(0, 50), (150, 151)], num_heads=8, num_kv_heads=8, head_dim=128, rotated=False),
    "large pages": Case(spans=[(0, 200), (190, 191)], num_heads=6, num_kv_heads=2, head_dim=32, page_size=128),
    "one KV head for all": Case(spans=[(0, 20), (150, 151)], num_heads=32, num_kv_heads=1, head_dim=256, page_size=32),
    "single-token pages": Case(spans=[(0, 33), (65, 66)], num_heads=7, num_kv_heads=7, head_dim=48, page_size=1),
}
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 0.035, torch.float16: 0.004}
"""Absolute, for outputs of order one: the types' own rounding, and for bfloat16 that of probabilities as well."""


@pytest.fixture(scope="module")
def native() -> Kernels:
    return NativeKernels(num_threads=2)


@pytest.fixture(scope="module")
def jit() -> Kernels:
    return JitKernels(num_threads=2)


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """The C++ kernels without AVX-512, whose own code paths are what most machines run."""
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("needs g++ on x86-64")
    library = tmp_path_factory.mktemp("portable") / "kernels.so"
    flags = ["-std=c++17", "-O1", "-march=x86-64-v3", "-fopenmp", "-fPIC", "-w", "-shared"]
    command = [compiler, *flags, str(SOURCES / "kernels.cpp"), str(loaded_openmp_runtime()), "-o", str(library)]
    subprocess.run(command, check=True, timeout=120)
    return NativeKernels(num_threads=2, library=Path(library))


def assert_like_plain(kernels: Kernels, case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    expected, expected_pool = inputs.run(PlainAttention(inputs.shape))
    out, pool = inputs.run(kernels.attention(inputs.shape))
    torch.testing.assert_close(out, expected, atol=TOLERANCE[dtype], rtol=0)
    # Rotation may round differently: by a unit in the last place, or a little more where terms cancel.
    torch.testing.assert_close(pool, expected_pool, atol=2e-6, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_native(native: Kernels, name: str, dtype: torch.dtype) -> None:
    assert_like_plain(native, CASES[name], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["mixed", "padded head, odd pages", "norms", "one KV head for all"])
def test_jit(jit: Kernels, name: str, dtype: torch.dtype) -> None:
    assert_like_plain(jit, CASES[name], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["mixed", "padded head, odd pages", "tiny head", "no rotation"])
def test_native_without_avx512(portable: Kernels, name: str, dtype: torch.dtype) -> None:
    assert_like_plain(portable, CASES[name], dtype)


def test_only_written_slots_change(native: Kernels) -> None:
    inputs = make_inputs(CASES["mixed"], torch.float32)
    _, pool = inputs.run(native.attention(inputs.shape))
    untouched = torch.ones_like(inputs.stored, dtype=torch.bool)
    pages, offsets = inputs.batch.slots // 16, inputs.batch.slots % 16
    untouched[pages, 1, :, :, offsets] = False
    assert torch.equal(pool[untouched], inputs.stored[untouched])
    assert not torch.equal(pool, inputs.stored)


def test_threads_change_no_bit() -> None:
    inputs = make_inputs(Case(spans=[(0, 70), (1500, 1501), (0, 9)]), torch.float32)
    alone, *others = (inputs.run(NativeKernels(num_threads=n).attention(inputs.shape))[0] for n in (1, 2, 5))
    assert all(torch.equal(other, alone) for other in others)


def test_extreme_scores_stay_finite(native: Kernels) -> None:
    """Scores far beyond what exponentials can hold still give the likeliest key's value."""
    inputs = make_inputs(Case(spans=[(0, 130)], rotated=False), torch.float32)
    inputs.qkv.mul_(300)
    expected, _ = inputs.run(PlainAttention(inputs.shape))
    out, _ = inputs.run(native.attention(inputs.shape))
    torch.testing.assert_close(out, expected, atol=0.05, rtol=1e-4)


def test_a_pool_of_another_model_is_refused() -> None:
    inputs = make_inputs(CASES["mixed"], torch.float32)
    other = make_inputs(CASES["mixed"], torch.bfloat16)
    backend = NativeKernels(num_threads=1).attention(other.shape)
    assert isinstance(backend, NativeAttention)
    with pytest.raises(ValueError, match=r"float32.*bfloat16"):
        backend.plan(inputs.batch, inputs.fresh_pool())


def test_page_lists_leave_the_padding_out() -> None:
    inputs = make_inputs(Case(spans=[(0, 16), (0, 17), (47, 48)]), torch.float32)
    starts, pages, last = page_lists(inputs.batch, 16)
    table = inputs.batch.page_table
    assert starts.tolist() == [0, 1, 3, 6]
    assert pages.tolist() == [table[0, 0], *table[1, :2], *table[2, :3]]
    assert last.tolist() == [16, 1, 16]
