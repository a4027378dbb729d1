"""The native decoder: one parametrised transformer for the Llama family and its relatives, over packed tokens.

Made once from a checkpoint's weights, which it merges (q, k, v; gate, up) and packs; then `forward` computes one batch
after another on the engine thread. What differs between architectures is in `DecoderConfig`, not in subclasses. Dense
models on the CPU run fused in C++ (`fused.py`), all others layer by layer (`layered.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from engine.attention.backend import AttentionShape
from engine.batch import Batch
from engine.kernels.interface import Kernels
from engine.kernels.native import NativeKernels
from engine.kernels.select import open_kernels
from engine.kv_spec import KVPool
from engine.model.checkpoint import CheckpointReader
from engine.model.config import ModelConfig
from engine.model.decoder_config import DecoderConfig
from engine.model.errors import UnsupportedModelError
from engine.model.fused import FusedDecoder, can_fuse
from engine.model.layered import LayeredDecoder


class NativeDecoder:
    """Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE.

    `weights` maps Hugging Face's names to tensors of any floating point type; each is read once, so a mapping that
    loads on access keeps one weight at a time. `kernels` overrides the choice made for `device`. Raises
    `UnsupportedModelError` for a config the decoder does not honour, `ConfigError` for weights that are missing or of
    another shape than the config says.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, torch.Tensor],
        *,
        num_threads: int,
        device: str = "cpu",
        kernels: Kernels | None = None,
    ) -> None:
        if config.decoder is None:
            raise UnsupportedModelError(config.native_refusal)
        self.config = config
        chosen = kernels or open_kernels(device, num_threads=num_threads)
        reader = CheckpointReader(config, config.decoder, weights, chosen.device)
        self._body = _make_body(config, config.decoder, reader, chosen)

    @torch.inference_mode()
    def forward(self, batch: Batch, pool: KVPool) -> torch.Tensor:
        """Logits float32 `[rows, vocab]` of the batch's `logit_rows`; K and V of its tokens are in `pool` afterwards.

        The result is an inference tensor: change it in place only under `torch.inference_mode()`.
        """
        return self._body.forward(batch, pool)


def _make_body(
    config: ModelConfig, decoder: DecoderConfig, reader: CheckpointReader, kernels: Kernels
) -> FusedDecoder | LayeredDecoder:
    shape = AttentionShape(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=config.dtype,
        scale=config.head_dim**-0.5,
        rope=decoder.rope.table(config.max_position_embeddings).to(kernels.device),
        norm_eps=decoder.rms_norm_eps,
    )
    if isinstance(kernels, NativeKernels) and can_fuse(config, decoder):
        return FusedDecoder(config, decoder, reader, kernels, shape)
    return LayeredDecoder(config, decoder, reader, kernels, shape)
