"""Loading: every way a model's files can be wrong gets an error that names it, and dtypes resolve as promised."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from engine.model.errors import CheckpointError, ConfigError, UnsupportedModelError
from engine.model.loader import load_model, resolve_dtype
from engine.model.weights import SafetensorsFolder, fingerprint
from tests.unit.tiny_models import SIZES, PagedRun, random_sequences, reference_logits, save_random_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("llama")
    save_random_model(LlamaConfig(**SIZES, num_key_value_heads=2), folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load(folder: Path, **options: Any) -> Any:
    return load_model(folder, **({"dtype": "float32", "num_threads": 1} | options))


def test_a_sharded_folder_is_the_same_model(saved: Path, tmp_path: Path) -> None:
    reference = save_random_model(LlamaConfig(**SIZES, num_key_value_heads=2), tmp_path, shard="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    sequences = random_sequences([20])
    run = PagedRun(load(tmp_path), sequences)
    run.finish(1000)
    torch.testing.assert_close(run.logits[0], reference_logits(reference, sequences[0]), atol=1e-4, rtol=1e-4)


def test_the_config_says_what_it_should(saved: Path) -> None:
    config = load(saved).config
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (3, 4, 2, 16)
    assert (config.eos_token_ids, config.dtype) == ((2,), torch.float32)


def test_generation_config_names_more_ends(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load(folder).config.eos_token_ids == (2, 7)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no folder"):
        load(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="there is no GGUF file"):
        load(tmp_path / "absent.gguf")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load(folder)


def test_a_malformed_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"architectures": [')
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load(folder)


def test_a_truncated_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="download it again"):
        load(folder)


def test_a_missing_shard(tmp_path: Path) -> None:
    save_random_model(LlamaConfig(**SIZES, num_key_value_heads=2), tmp_path, shard="100KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=lost.name):
        load(tmp_path)


def test_a_missing_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder)


def test_a_tensor_that_the_config_does_not_explain(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"q_proj\.bias"):
        load(folder)


def test_another_shape(folder: Path) -> None:
    edit_config(folder, intermediate_size=128)
    with pytest.raises(ConfigError, match="128"):
        load(folder)


def test_an_unknown_architecture(folder: Path) -> None:
    edit_config(folder, architectures=["NobodyForCausalLM"], model_type="nobody")
    with pytest.raises(UnsupportedModelError, match="nobody"):
        load(folder)


def test_quantised_weights(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(UnsupportedModelError, match="quantised"):
        load(folder)


def test_an_unknown_dtype_or_device(saved: Path) -> None:
    with pytest.raises(ValueError, match="float8"):
        load(saved, dtype="float8")
    with pytest.raises(UnsupportedModelError, match="cuda"):
        load(saved, device="cuda")


@pytest.mark.parametrize(
    ("requested", "stored", "features", "expected"),
    [
        ("auto", "bfloat16", {"avx512_bf16"}, torch.bfloat16),
        ("auto", "bfloat16", {"avx2"}, torch.float32),
        ("auto", "float16", {"amx_bf16"}, torch.bfloat16),
        ("auto", "float32", {"avx512_bf16"}, torch.float32),
        ("auto", None, {"avx512_bf16"}, torch.bfloat16),
        ("auto", None, set(), torch.float32),
        ("float16", "float32", set(), torch.float16),
        ("bfloat16", "float32", set(), torch.bfloat16),
    ],
)
def test_dtypes(requested: str, stored: str | None, features: set[str], expected: torch.dtype) -> None:
    assert resolve_dtype(requested, stored, frozenset(features)) is expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near_float32(saved: Path, dtype: str) -> None:
    sequences = random_sequences([20, 50])
    exact, rounded = PagedRun(load(saved), sequences), PagedRun(load(saved, dtype=dtype), sequences)
    for run in (exact, rounded):
        run.finish(16)
    for one, other in zip(exact.logits, rounded.logits, strict=True):
        assert float((one - other).abs().mean()) < 0.03 * float(one.std())


def test_fingerprints_tell_weights_apart(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    copy = tmp_path / "other-name.safetensors"
    shutil.copy(path, copy)
    assert fingerprint([path]) == fingerprint([copy])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    assert fingerprint([path]) != fingerprint([copy])


def test_an_index_that_is_none(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no index"):
        SafetensorsFolder(folder)
