"""A dense decoder whose whole forward pass is one call into the C++ kernels.

Python is left for a step and entered once at its end, so a step costs its arithmetic and its memory traffic, and other
threads of this process cannot slow it by holding the interpreter. Weights are packed by the kernels (csrc/gemm.h): on
two cores that halved the time of a step of one to eight tokens against oneDNN's packed products, and was level with
them at 512. A token's logits are the same, to the last bit, in any batch, chunk and number of threads.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from engine.attention.backend import AttentionShape
from engine.attention.native import NativeAttention
from engine.batch import Batch
from engine.kernels import library as abi
from engine.kernels.native import NativeKernels
from engine.kv_spec import KVPool
from engine.model.arena import Arena
from engine.model.checkpoint import CheckpointReader, LinearWeight
from engine.model.config import ModelConfig
from engine.model.decoder_config import DecoderConfig

_FUSED_DTYPES = (torch.float32, torch.bfloat16)


def can_fuse(config: ModelConfig, decoder: DecoderConfig) -> bool:
    """Whether the kernels have every product this decoder needs."""
    widths = (config.hidden_size, decoder.intermediate_size, config.num_heads * config.head_dim)
    return decoder.moe is None and config.dtype in _FUSED_DTYPES and all(width % 2 == 0 for width in widths)


class FusedDecoder:
    """Llama, Mistral, Qwen2, Qwen3 in float32 or bfloat16 on the CPU."""

    def __init__(
        self,
        config: ModelConfig,
        decoder: DecoderConfig,
        reader: CheckpointReader,
        kernels: NativeKernels,
        shape: AttentionShape,
    ) -> None:
        self._config = config
        self._library = kernels.library
        self._attention = NativeAttention(shape, kernels.library, num_threads=kernels.num_threads)
        self._arena = Arena()
        self._alive: list[torch.Tensor] = []
        """Every tensor whose address the structs below hold."""
        self._layers = (abi.DecoderLayer * config.num_layers)(
            *(self._read_layer(index, decoder, reader) for index in range(config.num_layers))
        )
        embedding = reader.embedding()
        self._model = abi.Decoder(
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            layers=ctypes.addressof(self._layers),
            embedding=self._keep(embedding),
            norm=self._keep(reader.final_norm()),
            head=self._pack(reader.head(embedding)),
            norm_eps=decoder.rms_norm_eps,
        )
        self._batch = abi.DecoderBatch()
        self._widths = (config.hidden_size, shape.qkv_width, config.num_heads * config.head_dim)
        self._intermediate = decoder.intermediate_size
        self._capacity = 0
        self._scratch: tuple[torch.Tensor, ...] = ()

    def forward(self, batch: Batch, pool: KVPool) -> torch.Tensor:
        """Logits float32 `[rows, vocab]`; see `NativeDecoder.forward`."""
        self._attention.plan(batch, pool)
        if batch.num_tokens > self._capacity:
            self._grow(-(-batch.num_tokens // 256) * 256)
        rows = batch.logit_rows.shape[0]
        # By numpy, which keeps the interpreter: the thread that fills masks has just been woken, and would take it.
        logits = torch.from_numpy(np.empty((rows, self._config.vocab_size), np.float32))
        arguments = self._batch
        arguments.token_ids = batch.token_ids.data_ptr()
        arguments.logit_rows = batch.logit_rows.data_ptr()
        arguments.num_rows = rows
        arguments.logits = logits.data_ptr()
        self._library.forward(ctypes.addressof(self._model), self._attention.step_address, ctypes.addressof(arguments))
        return logits

    def _grow(self, capacity: int) -> None:
        hidden, qkv, attended = self._widths
        dtype = self._config.dtype
        residual = torch.empty((capacity, hidden), dtype=torch.float32)
        others = [torch.empty((capacity, width), dtype=dtype) for width in (hidden, qkv, attended, self._intermediate)]
        self._scratch = (residual, *others)
        names = ("residual", "normed", "qkv", "attended", "activated")
        for name, buffer in zip(names, self._scratch, strict=True):
            setattr(self._batch, name, buffer.data_ptr())
        self._capacity = capacity

    def _read_layer(self, index: int, decoder: DecoderConfig, reader: CheckpointReader) -> abi.DecoderLayer:
        input_norm, post_norm = reader.layer_norms(index)
        q_norm, k_norm = reader.head_norms(index)
        at, width = f"model.layers.{index}.mlp", decoder.intermediate_size
        return abi.DecoderLayer(
            input_norm=self._keep(input_norm),
            q_norm=None if q_norm is None else self._keep(q_norm),
            k_norm=None if k_norm is None else self._keep(k_norm),
            post_norm=self._keep(post_norm),
            qkv=self._pack(reader.qkv(index)),
            output=self._pack(reader.attention_output(index)),
            gate_up=self._pack(reader.gate_up(at, width, bias=decoder.mlp_bias), two_halves=True),
            down=self._pack(reader.down(at, width, bias=decoder.mlp_bias)),
        )

    def _pack(self, linear: LinearWeight, *, two_halves: bool = False) -> abi.PackedLinear:
        outputs, inputs = linear.weight.shape
        code = abi.dtype_code(self._config.dtype)
        elements = self._library.packed_elements(code, outputs, inputs, two_halves)
        assert elements, "can_fuse has checked that there is a product for this weight"
        packed = self._arena.empty(elements, self._config.dtype)
        self._library.pack_linear(code, linear.weight.data_ptr(), outputs, inputs, two_halves, packed.data_ptr())
        bias = None if linear.bias is None else self._keep(linear.bias)
        return abi.PackedLinear(packed=self._keep(packed), bias=bias, outputs=outputs, inputs=inputs)

    def _keep(self, tensor: torch.Tensor) -> int:
        """Its address, valid as long as this decoder."""
        self._alive.append(tensor)
        return tensor.data_ptr()
