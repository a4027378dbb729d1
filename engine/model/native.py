"""The native decoder: one parametrised transformer for the Llama family and its relatives, over packed tokens.

Made once from a checkpoint's weights, which it merges (q, k, v; gate, up) and packs; then `forward` computes one batch
after another on the engine thread. What differs between architectures is in `DecoderConfig`, not in subclasses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.attention.backend import AttentionShape
from engine.batch import Batch
from engine.kernels.interface import Kernels
from engine.kernels.select import open_cpu_kernels
from engine.kv_spec import KVPool
from engine.model.config import DecoderConfig, ModelConfig
from engine.model.errors import ConfigError, UnsupportedModelError
from engine.model.linear import Linear, make_linear
from engine.model.moe import DenseFeedForward, MoeFeedForward


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class _Layer:
    input_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: Linear
    post_norm: torch.Tensor
    feed_forward: DenseFeedForward | MoeFeedForward


class NativeDecoder:
    """Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE.

    `weights` maps Hugging Face's names to tensors of any floating point type; each is read once, so a mapping that
    loads on access keeps one weight at a time. Raises `UnsupportedModelError` for a config the decoder does not
    honour, `ConfigError` for weights that are missing or of another shape than the config says.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, torch.Tensor],
        *,
        num_threads: int,
        kernels: Kernels | None = None,
    ) -> None:
        if config.decoder is None:
            raise UnsupportedModelError(config.native_refusal)
        self.config = config
        self._decoder = config.decoder
        self._kernels = kernels or open_cpu_kernels(num_threads=num_threads)
        reader = _WeightReader(config, config.decoder, weights, self._kernels)
        self._embedding = reader.tensor("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
        self._layers = [reader.layer(index) for index in range(config.num_layers)]
        self._norm = reader.tensor("model.norm.weight", (config.hidden_size,))
        self._head = (
            make_linear(self._embedding)
            if config.decoder.tied_embeddings
            else reader.linear("lm_head", config.vocab_size, config.hidden_size)
        )
        shape = AttentionShape(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=config.dtype,
            scale=config.head_dim**-0.5,
            rope=config.decoder.rope.table(config.max_position_embeddings),
            norm_eps=config.decoder.rms_norm_eps,
        )
        self._attention = self._kernels.attention(shape)
        self._scratch = _Scratch(config)

    @torch.inference_mode()
    def forward(self, batch: Batch, pool: KVPool) -> torch.Tensor:
        """Logits float32 `[rows, vocab]` of the batch's `logit_rows`; K and V of its tokens are in `pool` afterwards.

        The result is an inference tensor: change it in place only under `torch.inference_mode()`.
        """
        kernels, eps = self._kernels, self._decoder.rms_norm_eps
        attention = self._attention
        attention.plan(batch, pool)
        residual = F.embedding(batch.token_ids, self._embedding)
        normed, attended = self._scratch.rows(batch.num_tokens)
        update: torch.Tensor | None = None
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            kernels.add_rms_norm(update, residual, layer.input_norm, normed, eps)
            attention.run(index, layer.qkv(normed), attended, q_norm=layer.q_norm, k_norm=layer.k_norm)
            if index == last and batch.logit_rows.shape[0] < batch.num_tokens:
                # Past the last attention only the rows whose logits are wanted matter.
                residual, attended = residual[batch.logit_rows], attended[batch.logit_rows]
                normed = normed[: residual.shape[0]]
                if residual.shape[0] == 0:
                    return residual.new_empty((0, self.config.vocab_size), dtype=torch.float32)
            update = layer.output(attended)
            kernels.add_rms_norm(update, residual, layer.post_norm, normed, eps)
            update = layer.feed_forward(normed)
        kernels.add_rms_norm(update, residual, self._norm, normed, eps)
        return self._head(normed).float()


class _Scratch:
    """Two activations that live through a whole step, kept between steps and grown when a batch needs more rows."""

    def __init__(self, config: ModelConfig) -> None:
        self._widths = (config.hidden_size, config.num_heads * config.head_dim)
        self._dtype = config.dtype
        self._buffers = self._allocate(0)

    def rows(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`[count, hidden]` and `[count, heads * head_dim]`, uninitialised."""
        if count > self._buffers[0].shape[0]:
            self._buffers = self._allocate(-(-count // 256) * 256)
        normed, attended = self._buffers
        return normed[:count], attended[:count]

    def _allocate(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        normed, attended = (torch.empty((count, width), dtype=self._dtype) for width in self._widths)
        return normed, attended


class _WeightReader:
    """Reads, checks, converts, merges and packs a checkpoint's tensors."""

    def __init__(
        self, config: ModelConfig, decoder: DecoderConfig, weights: Mapping[str, torch.Tensor], kernels: Kernels
    ) -> None:
        self._config = config
        self._decoder = decoder
        self._weights = weights
        self._kernels = kernels

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name not in self._weights:
            raise ConfigError(f"the checkpoint has no tensor {name}, which {self._config.architecture} needs")
        found = self._weights[name]
        if tuple(found.shape) != shape:
            raise ConfigError(f"tensor {name} has shape {tuple(found.shape)}, but config.json asks for {shape}")
        return found.detach().to(self._config.dtype).contiguous()

    def merged(self, names: list[str], heights: list[int], width: int, *, bias: bool) -> Linear:
        """One linear layer whose output is those of `names`, side by side."""
        parts = [self.tensor(f"{n}.weight", (height, width)) for n, height in zip(names, heights, strict=True)]
        biases = [self.tensor(f"{n}.bias", (h,)) for n, h in zip(names, heights, strict=True)] if bias else []
        return make_linear(torch.cat(parts), torch.cat(biases) if bias else None)

    def linear(self, name: str, height: int, width: int, *, bias: bool = False) -> Linear:
        return self.merged([name], [height], width, bias=bias)

    def layer(self, index: int) -> _Layer:
        config, decoder = self._config, self._decoder
        at, hidden, head_dim = f"model.layers.{index}", config.hidden_size, config.head_dim
        q_height, kv_height = config.num_heads * head_dim, config.num_kv_heads * head_dim
        return _Layer(
            input_norm=self.tensor(f"{at}.input_layernorm.weight", (hidden,)),
            qkv=self.merged(
                [f"{at}.self_attn.{part}_proj" for part in "qkv"],
                [q_height, kv_height, kv_height],
                hidden,
                bias=decoder.qkv_bias,
            ),
            q_norm=self.tensor(f"{at}.self_attn.q_norm.weight", (head_dim,)) if decoder.qk_norm else None,
            k_norm=self.tensor(f"{at}.self_attn.k_norm.weight", (head_dim,)) if decoder.qk_norm else None,
            output=self.linear(f"{at}.self_attn.o_proj", hidden, q_height, bias=decoder.output_bias),
            post_norm=self.tensor(f"{at}.post_attention_layernorm.weight", (hidden,)),
            feed_forward=self._feed_forward(f"{at}.mlp", index),
        )

    def _feed_forward(self, at: str, index: int) -> DenseFeedForward | MoeFeedForward:
        moe = self._decoder.moe
        if moe is None or index not in moe.layers:
            return self._dense(at, self._decoder.intermediate_size, bias=self._decoder.mlp_bias)
        router = self.linear(f"{at}.gate", moe.num_experts, self._config.hidden_size)
        if f"{at}.experts.gate_up_proj" in self._weights:
            experts = self._stacked_experts(f"{at}.experts", moe.num_experts, moe.intermediate_size)
        else:
            experts = [self._dense(f"{at}.experts.{e}", moe.intermediate_size) for e in range(moe.num_experts)]
        return MoeFeedForward(router, experts, moe)

    def _dense(self, at: str, width: int, *, bias: bool = False) -> DenseFeedForward:
        hidden = self._config.hidden_size
        gate_up = self.merged([f"{at}.gate_proj", f"{at}.up_proj"], [width, width], hidden, bias=bias)
        return DenseFeedForward(gate_up, self.linear(f"{at}.down_proj", hidden, width, bias=bias), self._kernels, width)

    def _stacked_experts(self, at: str, count: int, width: int) -> list[DenseFeedForward]:
        """All experts of a layer in two tensors, as transformers holds them in memory."""
        hidden = self._config.hidden_size
        gate_up = self.tensor(f"{at}.gate_up_proj", (count, 2 * width, hidden))
        down = self.tensor(f"{at}.down_proj", (count, hidden, width))
        return [
            DenseFeedForward(make_linear(gate_up[e]), make_linear(down[e]), self._kernels, width) for e in range(count)
        ]
