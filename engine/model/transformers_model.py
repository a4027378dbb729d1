"""Any other causal language model, computed by transformers with its attention replaced by ours over pages.

Lifecycle of a load: the config is checked; the weights are read by transformers; the model runs once on a short probe
with `Recorder` in place of its attention, which notes what the layers ask for; the same probe through the model's
own attention must give the same logits, which finds whatever no list of names foresaw; then `PagedAttention`
takes the recorder's place for good. Tokens are packed `[1, tokens]`, positions are passed explicitly, no mask is
made, and sequences are kept apart by the page table alone (the idea of transformers' continuous batching).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine.attention.backend import AttentionBackend, AttentionShape
from engine.batch import Batch
from engine.kernels.interface import Kernels
from engine.kernels.select import open_cpu_kernels
from engine.kv_spec import KVPool
from engine.model.config import ModelConfig
from engine.model.errors import CheckpointError, UnsupportedModelError
from engine.model.transformers_attention import ATTENTION_NAME, AttentionSlot, LayerFacts, PagedAttention, Recorder
from engine.model.transformers_refusals import refuse_by_class, refuse_by_config

_PROBE_TOKENS = 12
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Allowed mean distance of the probe's logits, relative to their own spread."""


class TransformersDecoder:
    """A transformers model over our KV pool; see the module's docstring for what `load` does."""

    def __init__(self, model: Any, config: ModelConfig, backend: AttentionBackend) -> None:
        """`model` has been through `load`."""
        self.config = config
        self._model = model
        self._backend = backend
        self._selects_rows = "logits_to_keep" in inspect.signature(model.forward).parameters

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        eos_token_ids: int | Sequence[int] | None,
        dtype: torch.dtype,
        model_id: str,
        num_threads: int,
        kernels: Kernels | None = None,
    ) -> TransformersDecoder:
        """Raises `UnsupportedModelError` naming what cannot be honoured, `CheckpointError` for unreadable files."""
        config, model, name = _read(folder, dtype)
        recorder = Recorder(name)
        slot = AttentionSlot(model, recorder)
        _probe(name, model, dtype, recorder)
        facts = _common_facts(name, config, recorder.facts)
        shape = AttentionShape(
            num_heads=facts.num_heads,
            num_kv_heads=facts.num_kv_heads,
            head_dim=facts.head_dim,
            dtype=dtype,
            scale=facts.scale,
            rope=None,
        )
        backend = (kernels or open_cpu_kernels(num_threads=num_threads)).attention(shape)
        slot.attention = PagedAttention(backend, dtype)
        named = _with_common_names(config) | {"eos_token_id": eos_token_ids}
        described = ModelConfig.from_hf(named, dtype=dtype, model_id=model_id)
        described = dataclasses.replace(described, num_kv_heads=facts.num_kv_heads, head_dim=facts.head_dim)
        return cls(model, described, backend)

    @torch.inference_mode()
    def forward(self, batch: Batch, pool: KVPool) -> torch.Tensor:
        """Logits float32 `[rows, vocab]` of `batch.logit_rows`; K and V of its tokens are in `pool` afterwards."""
        self._backend.plan(batch, pool)
        options: dict[str, Any] = {"logits_to_keep": batch.logit_rows} if self._selects_rows else {}
        output = self._model(
            input_ids=batch.token_ids[None], position_ids=batch.positions[None], use_cache=False, **options
        )
        logits: torch.Tensor = output.logits[0]
        return (logits if self._selects_rows else logits[batch.logit_rows]).float()


def _read(folder: Path, dtype: torch.dtype) -> tuple[Any, Any, str]:
    """The text config, the model and the name of its class."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise UnsupportedModelError(
            f"{folder}: neither the native decoder nor transformers knows it: {error}"
        ) from error
    name = (config.architectures or [config.model_type])[0]
    text = config.get_text_config(decoder=True)
    refuse_by_config(name, text)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(f"{name} has quantised weights, which are not read here; use unquantised ones")
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            attn_implementation="eager",
            output_loading_info=True,
        )
    except (ValueError, OSError, RuntimeError) as error:
        raise CheckpointError(f"transformers cannot load {name} from {folder}: {error}") from error
    lacking = sorted(map(str, (*found["missing_keys"], *found["mismatched_keys"])))
    if lacking:  # transformers would fill these with random numbers
        raise CheckpointError(f"{folder} lacks {len(lacking)} tensors of {name} ({', '.join(lacking[:3])})")
    model.eval()
    refuse_by_class(name, model)
    return text, model, name


@torch.inference_mode()
def _probe(name: str, model: Any, dtype: torch.dtype, recorder: Recorder) -> None:
    """Run the model's own attention and the recorder on one sequence; raise unless the logits agree."""
    vocab_size = int(model.get_input_embeddings().weight.shape[0])
    tokens = (torch.arange(_PROBE_TOKENS, dtype=torch.int64)[None] * 7919 + 13) % vocab_size
    positions = torch.arange(_PROBE_TOKENS, dtype=torch.int64)[None]
    inputs = {"input_ids": tokens, "position_ids": positions, "use_cache": False}
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(f"{name} takes no position_ids, so packed sequences would be misplaced")
    own = model(**inputs).logits.float()
    model.set_attn_implementation(ATTENTION_NAME)
    replaced = model(**inputs).logits.float()
    if not recorder.facts:
        raise UnsupportedModelError(f"{name} never calls the attention that was put into it; use another model")
    distance = float((own - replaced).abs().mean() / own.std().clamp_min(1e-6))
    if not distance <= _TOLERANCE[dtype]:
        raise UnsupportedModelError(
            f"{name} does something that plain causal attention does not: on a probe its logits differ by "
            f"{distance:.3g} of their spread (allowed: {_TOLERANCE[dtype]}); use another model"
        )


def _common_facts(name: str, config: Any, facts: dict[int, LayerFacts]) -> LayerFacts:
    """What all layers have in common; raises when they differ or are not numbered 0 to n - 1."""
    if sorted(facts) != list(range(config.num_hidden_layers)):
        raise UnsupportedModelError(
            f"{name} has {config.num_hidden_layers} layers, of which {sorted(facts)} attend; use another model"
        )
    kinds = set(facts.values())
    if len(kinds) > 1:
        raise UnsupportedModelError(f"{name} has attention layers of unequal kinds ({kinds}); use another model")
    return kinds.pop()


def _with_common_names(config: Any) -> dict[str, Any]:
    """The config's fields, and those `ModelConfig` reads under the names that most models give them."""
    fields: dict[str, Any] = config.to_dict()
    for field in (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
        "bos_token_id",
    ):
        fields[field] = getattr(config, field, None)
    return fields
