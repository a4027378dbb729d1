"""Reads a decoder's tensors by Hugging Face's names: checked against the config, converted, merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from engine.model.config import ModelConfig
from engine.model.decoder_config import DecoderConfig
from engine.model.errors import ConfigError


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearWeight:
    """`weight [outputs, inputs]` and `bias [outputs]` of one or several merged layers, in the model's type."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class CheckpointReader:
    """Each tensor is read once and put on `device`, so a mapping that loads on access keeps one at a time.

    Every method raises `ConfigError` for a tensor that is missing or of another shape than the config says.
    """

    def __init__(
        self, config: ModelConfig, decoder: DecoderConfig, weights: Mapping[str, torch.Tensor], device: torch.device
    ) -> None:
        self._config = config
        self._decoder = decoder
        self._weights = weights
        self._device = device

    @property
    def hidden_size(self) -> int:
        return self._config.hidden_size

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """`[*shape]`, in the model's type."""
        if name not in self._weights:
            raise ConfigError(f"the checkpoint has no tensor {name}, which {self._config.architecture} needs")
        found = self._weights[name]
        if tuple(found.shape) != shape:
            raise ConfigError(f"tensor {name} has shape {tuple(found.shape)}, but config.json asks for {shape}")
        return found.detach().to(device=self._device, dtype=self._config.dtype).contiguous()

    def merged(self, names: Sequence[str], heights: Sequence[int], inputs: int, *, bias: bool = False) -> LinearWeight:
        """One layer whose outputs are those of `names`, one after another."""
        weights = [self.tensor(f"{name}.weight", (h, inputs)) for name, h in zip(names, heights, strict=True)]
        biases = [self.tensor(f"{name}.bias", (h,)) for name, h in zip(names, heights, strict=True)] if bias else []
        return LinearWeight(weight=torch.cat(weights), bias=torch.cat(biases) if biases else None)

    # ---- the parts of a decoder ---------------------------------------------------------------------------

    def embedding(self) -> torch.Tensor:
        """`[vocab, hidden]`."""
        return self.tensor("model.embed_tokens.weight", (self._config.vocab_size, self._config.hidden_size))

    def final_norm(self) -> torch.Tensor:
        """`[hidden]`."""
        return self.tensor("model.norm.weight", (self._config.hidden_size,))

    def head(self, embedding: torch.Tensor) -> LinearWeight:
        """Hidden to vocabulary: `embedding` itself where the model has one for both."""
        if self._decoder.tied_embeddings:
            return LinearWeight(weight=embedding, bias=None)
        return self.merged(["lm_head"], [self._config.vocab_size], self._config.hidden_size)

    def layer_norms(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Before attention, and before the feed-forward."""
        at, shape = f"model.layers.{layer}", (self._config.hidden_size,)
        before = self.tensor(f"{at}.input_layernorm.weight", shape)
        return before, self.tensor(f"{at}.post_attention_layernorm.weight", shape)

    def head_norms(self, layer: int) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        """Of q and of k, where the architecture has them."""
        if not self._decoder.qk_norm:
            return None, None
        at, shape = f"model.layers.{layer}.self_attn", (self._config.head_dim,)
        return self.tensor(f"{at}.q_norm.weight", shape), self.tensor(f"{at}.k_norm.weight", shape)

    def qkv(self, layer: int) -> LinearWeight:
        """Hidden to all heads of q, then of k, then of v."""
        config = self._config
        names = [f"model.layers.{layer}.self_attn.{part}_proj" for part in "qkv"]
        heights = [count * config.head_dim for count in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
        return self.merged(names, heights, config.hidden_size, bias=self._decoder.qkv_bias)

    def attention_output(self, layer: int) -> LinearWeight:
        """All heads to hidden."""
        config = self._config
        return self.merged(
            [f"model.layers.{layer}.self_attn.o_proj"],
            [config.hidden_size],
            config.num_heads * config.head_dim,
            bias=self._decoder.output_bias,
        )

    def gate_up(self, at: str, width: int, *, bias: bool) -> LinearWeight:
        """Hidden to `width` gates, then as many values, of the feed-forward under the name `at`."""
        return self.merged([f"{at}.gate_proj", f"{at}.up_proj"], [width, width], self._config.hidden_size, bias=bias)

    def down(self, at: str, width: int, *, bias: bool) -> LinearWeight:
        """`width` to hidden, of the feed-forward under the name `at`."""
        return self.merged([f"{at}.down_proj"], [self._config.hidden_size], width, bias=bias)
