"""Feed-forward layers of the native decoder: dense, and mixture of experts with a softmax router (Qwen3-MoE)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.kernels.interface import Kernels
from engine.model.checkpoint import CheckpointReader, LinearWeight
from engine.model.decoder_config import MoeConfig
from engine.model.linear import Linear, make_linear


class DenseFeedForward:
    """`down(silu(gate(x)) * up(x))`, gate and up in one product."""

    def __init__(self, gate_up: Linear, down: Linear, kernels: Kernels, intermediate_size: int) -> None:
        self._gate_up = gate_up
        self._down = down
        self._kernels = kernels
        self._width = intermediate_size

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x [rows, hidden] -> [rows, hidden]`."""
        gate_up = self._gate_up(x)
        activated = gate_up.new_empty((gate_up.shape[0], self._width))
        self._kernels.silu_mul(gate_up, activated)
        return self._down(activated)


class MoeFeedForward:
    """Each row goes through its `experts_per_token` likeliest experts, weighted by the router's probabilities."""

    def __init__(self, router: Linear, experts: Sequence[DenseFeedForward], config: MoeConfig) -> None:
        self._router = router
        self._experts = experts
        self._config = config

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x [rows, hidden] -> [rows, hidden]`."""
        probabilities = self._router(x).float().softmax(dim=-1)
        weights, chosen = probabilities.topk(self._config.experts_per_token, dim=-1)
        if self._config.normalise_weights:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        weights = weights.to(x.dtype)
        out = torch.zeros_like(x)
        # Rows sorted by expert: each expert that was chosen at all multiplies its rows in one product.
        order = chosen.flatten().argsort(stable=True)
        rows = order // self._config.experts_per_token
        counts = chosen.flatten().bincount(minlength=len(self._experts)).tolist()
        scale = weights.flatten()[order].unsqueeze(1)
        start = 0
        for expert, count in zip(self._experts, counts, strict=True):
            if count:
                part = slice(start, start + count)
                out.index_add_(0, rows[part], expert(x[rows[part]]) * scale[part])
                start += count
        return out


def read_dense(
    at: str, width: int, reader: CheckpointReader, kernels: Kernels, *, bias: bool = False
) -> DenseFeedForward:
    """The feed-forward layer whose weights are named `at`.gate_proj and so on."""
    gate_up = make_linear(reader.gate_up(at, width, bias=bias))
    return DenseFeedForward(gate_up, make_linear(reader.down(at, width, bias=bias)), kernels, width)


def read_moe(at: str, config: MoeConfig, reader: CheckpointReader, kernels: Kernels) -> MoeFeedForward:
    """The mixture named `at`: its experts one by one, as files hold them, or stacked, as transformers' memory does."""
    count, width, hidden = config.num_experts, config.intermediate_size, reader.hidden_size
    router = make_linear(reader.merged([f"{at}.gate"], [count], hidden))
    stacked = f"{at}.experts.gate_up_proj"
    if stacked not in reader:
        experts = [read_dense(f"{at}.experts.{expert}", width, reader, kernels) for expert in range(count)]
        return MoeFeedForward(router, experts, config)
    gate_up = reader.tensor(stacked, (count, 2 * width, hidden))
    down = reader.tensor(f"{at}.experts.down_proj", (count, hidden, width))
    experts = [
        DenseFeedForward(
            make_linear(LinearWeight(weight=gate_up[expert], bias=None)),
            make_linear(LinearWeight(weight=down[expert], bias=None)),
            kernels,
            width,
        )
        for expert in range(count)
    ]
    return MoeFeedForward(router, experts, config)
