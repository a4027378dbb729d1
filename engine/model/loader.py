"""`load_model`: a folder or GGUF file to a model that computes batches, by the fastest way that honours all of it.

The native decoder (`native.py`) takes the Llama family; any other causal language model goes through transformers
(`transformers_model.py`). Whatever neither honours is refused here, at load, by name.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from engine.batch import Batch
from engine.kv_spec import KVCacheSpec, KVPool
from engine.model.config import ModelConfig
from engine.model.config_fields import DTYPES
from engine.model.decoder_config import Architecture
from engine.model.errors import CheckpointError, UnsupportedModelError
from engine.model.native import NativeDecoder
from engine.model.weights import SafetensorsFolder, TrackedWeights, fingerprint

_LOG = logging.getLogger(__name__)
_BFLOAT16_FEATURES = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


class Decoder(Protocol):
    """What both ways offer."""

    @property
    def config(self) -> ModelConfig: ...

    def forward(self, batch: Batch, pool: KVPool) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready to compute. Used by one thread at a time."""

    config: ModelConfig
    implementation: str
    """`native` or `transformers`."""
    decoder: Decoder

    def kv_spec(self, page_size: int) -> KVCacheSpec:
        """The shape of its KV pages."""
        return KVCacheSpec(
            num_layers=self.config.num_layers,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            page_size=page_size,
            dtype=self.config.dtype,
        )

    def forward(self, batch: Batch, pool: KVPool) -> torch.Tensor:
        """Logits float32 `[rows, vocab]` of `batch.logit_rows`; writes the batch's K and V into `pool`."""
        return self.decoder.forward(batch, pool)


def load_model(path: str | Path, *, dtype: str = "auto", device: str = "cpu", num_threads: int) -> LoadedModel:
    """The model in a folder of safetensors, or in a GGUF file of the Llama family.

    `dtype` is `auto`, `bfloat16`, `float16` or `float32`. Raises `CheckpointError` for missing or damaged files,
    `ConfigError` for an impossible config.json, `UnsupportedModelError` for a model that cannot be run faithfully.
    """
    path = Path(path).expanduser()
    if torch.device(device).type != "cpu":
        raise UnsupportedModelError(f"device {device!r} is asked for, but models run on 'cpu' only")
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is none of auto, {', '.join(DTYPES)}")
    if path.suffix == ".gguf":
        return _load_gguf(path, dtype=dtype, num_threads=num_threads)
    return _load_folder(path, dtype=dtype, num_threads=num_threads)


def resolve_dtype(requested: str, stored: str | None, cpu_features: frozenset[str]) -> torch.dtype:
    """The type to compute in. `auto` keeps float32 checkpoints, and computes all others in bfloat16 where the
    processor has instructions for it, in float32 where it has not (where bfloat16 would be slower, not faster)."""
    if requested != "auto":
        return DTYPES[requested]
    if stored == "float32" or not cpu_features & _BFLOAT16_FEATURES:
        return torch.float32
    return torch.bfloat16


def _load_folder(folder: Path, *, dtype: str, num_threads: int) -> LoadedModel:
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}; name one that holds config.json and safetensors files")
    raw = _read_json(folder / "config.json")
    generation = _read_json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {}
    if generation.get("eos_token_id") is not None:
        # Chat models list there every token that ends a turn; config.json often knows only one.
        raw["eos_token_id"] = generation["eos_token_id"]
    weights = SafetensorsFolder(folder)
    resolved = _resolve(dtype, raw)
    model_id = fingerprint([folder / "config.json", *weights.files])
    config = _native_config(raw, resolved, model_id)
    if config is not None:
        return _native(config, weights, num_threads)
    from engine.model.transformers_model import TransformersDecoder  # only here: its import costs seconds

    decoder = TransformersDecoder.load(
        folder, eos_token_ids=raw.get("eos_token_id"), dtype=resolved, model_id=model_id, num_threads=num_threads
    )
    return LoadedModel(config=decoder.config, implementation="transformers", decoder=decoder)


def _load_gguf(path: Path, *, dtype: str, num_threads: int) -> LoadedModel:
    if not path.is_file():
        raise CheckpointError(f"there is no GGUF file {path}")
    from engine.model.gguf.reader import GgufFile  # only here: most starts read no GGUF

    file = GgufFile(path)
    raw = file.config()
    config = _native_config(raw, _resolve(dtype, raw), fingerprint([path]))
    if config is None:
        raise UnsupportedModelError(
            f"{path} holds a {file.architecture} model that the native decoder does not run, and transformers is not "
            "used for GGUF files; use the model's safetensors folder instead"
        )
    return _native(config, file, num_threads)


def _native_config(raw: Mapping[str, Any], dtype: torch.dtype, model_id: str) -> ModelConfig | None:
    """None when the native decoder does not run this model; the log says why."""
    names = raw.get("architectures") or ["unknown"]
    if names[0] not in {architecture.value for architecture in Architecture}:
        _LOG.info("%s runs through transformers: the native decoder has no such architecture", names[0])
        return None
    config = ModelConfig.from_hf(raw, dtype=dtype, model_id=model_id)
    if config.decoder is None:
        _LOG.info("%s runs through transformers: %s", names[0], config.native_refusal)
        return None
    return config


def _native(config: ModelConfig, weights: Mapping[str, torch.Tensor], num_threads: int) -> LoadedModel:
    assert config.decoder is not None
    read = TrackedWeights(weights)
    decoder = NativeDecoder(config, read, num_threads=num_threads)
    tied = {"lm_head.weight"} if config.decoder.tied_embeddings else set()
    unknown = [name for name in read.unread() if name not in tied]
    if unknown:
        raise UnsupportedModelError(
            f"the checkpoint has {len(unknown)} tensors ({', '.join(unknown[:3])}) for which {config.architecture}, as "
            "config.json describes it, has no use; the result would be wrong. Check that config.json belongs to it"
        )
    return LoadedModel(config=config, implementation="native", decoder=decoder)


def _resolve(requested: str, raw: Mapping[str, Any]) -> torch.dtype:
    stored = raw.get("dtype", raw.get("torch_dtype"))
    resolved = resolve_dtype(requested, stored, _cpu_features())
    _LOG.info("computing in %s (asked for: %s, stored: %s)", resolved, requested, stored or "not said")
    return resolved


def _cpu_features() -> frozenset[str]:
    """The first processor's feature names, as Linux reports them; none elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            return frozenset(value.split())
    return frozenset()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; name the folder that save_pretrained wrote") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy or download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__} where an object is expected")
    return value
