"""A decoder computed layer by layer from Python: for mixtures of experts, and where the fused step cannot run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.attention.backend import AttentionShape
from engine.batch import Batch
from engine.kernels.interface import Kernels
from engine.kv_spec import KVPool
from engine.model.checkpoint import CheckpointReader
from engine.model.config import ModelConfig
from engine.model.decoder_config import DecoderConfig
from engine.model.linear import Linear, make_linear
from engine.model.moe import DenseFeedForward, MoeFeedForward, read_dense, read_moe


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class _Layer:
    input_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: Linear
    post_norm: torch.Tensor
    feed_forward: DenseFeedForward | MoeFeedForward


class LayeredDecoder:
    """Any architecture of `DecoderConfig` with any `Kernels`."""

    def __init__(
        self,
        config: ModelConfig,
        decoder: DecoderConfig,
        reader: CheckpointReader,
        kernels: Kernels,
        shape: AttentionShape,
    ) -> None:
        self._vocab_size = config.vocab_size
        self._eps = decoder.rms_norm_eps
        self._kernels = kernels
        self._attention = kernels.attention(shape)
        self._embedding = reader.embedding()
        self._layers = [_read_layer(index, decoder, reader, kernels) for index in range(config.num_layers)]
        self._norm = reader.final_norm()
        self._head = make_linear(reader.head(self._embedding))
        self._scratch = _Scratch(config, kernels.device)

    def forward(self, batch: Batch, pool: KVPool) -> torch.Tensor:
        """Logits float32 `[rows, vocab]`; see `NativeDecoder.forward`."""
        kernels, attention, eps = self._kernels, self._attention, self._eps
        attention.plan(batch, pool)
        residual = F.embedding(batch.token_ids.to(self._kernels.device), self._embedding)
        normed, attended = self._scratch.rows(batch.num_tokens)
        update: torch.Tensor | None = None
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            kernels.add_rms_norm(update, residual, layer.input_norm, normed, eps)
            attention.run(index, layer.qkv(normed), attended, q_norm=layer.q_norm, k_norm=layer.k_norm)
            if index == last and batch.logit_rows.shape[0] < batch.num_tokens:
                # Past the last attention only the rows whose logits are wanted matter.
                rows = batch.logit_rows.to(self._kernels.device)
                residual, attended = residual[rows], attended[rows]
                normed = normed[: residual.shape[0]]
                if residual.shape[0] == 0:
                    return residual.new_empty((0, self._vocab_size), dtype=torch.float32)
            update = layer.output(attended)
            kernels.add_rms_norm(update, residual, layer.post_norm, normed, eps)
            update = layer.feed_forward(normed)
        kernels.add_rms_norm(update, residual, self._norm, normed, eps)
        return self._head(normed).float()


def _read_layer(index: int, decoder: DecoderConfig, reader: CheckpointReader, kernels: Kernels) -> _Layer:
    input_norm, post_norm = reader.layer_norms(index)
    q_norm, k_norm = reader.head_norms(index)
    at = f"model.layers.{index}.mlp"
    return _Layer(
        input_norm=input_norm,
        qkv=make_linear(reader.qkv(index)),
        q_norm=q_norm,
        k_norm=k_norm,
        output=make_linear(reader.attention_output(index)),
        post_norm=post_norm,
        feed_forward=(
            read_moe(at, decoder.moe, reader, kernels)
            if decoder.moe is not None and index in decoder.moe.layers
            else read_dense(at, decoder.intermediate_size, reader, kernels, bias=decoder.mlp_bias)
        ),
    )


class _Scratch:
    """Two activations that live through a whole step, kept between steps and grown when a batch needs more rows."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._widths = (config.hidden_size, config.num_heads * config.head_dim)
        self._dtype = config.dtype
        self._device = device
        self._buffers = self._allocate(0)

    def rows(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`[count, hidden]` and `[count, heads * head_dim]`, uninitialised."""
        if count > self._buffers[0].shape[0]:
            self._buffers = self._allocate(-(-count // 256) * 256)
        normed, attended = self._buffers
        return normed[:count], attended[:count]

    def _allocate(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        normed, attended = (
            torch.empty((count, width), dtype=self._dtype, device=self._device) for width in self._widths
        )
        return normed, attended
