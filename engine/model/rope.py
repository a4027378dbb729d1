"""Rotary position embeddings: inverse frequencies of the supported scalings and the cos/sin table.

Formulas after the papers: Su et al. 2021 (RoPE), Chen et al. 2023 (linear interpolation), Peng et al. 2023 (YaRN), and
the Llama 3.1 model card's frequency-dependent scaling. The table is computed in float32, as transformers does, so
that float32 models agree to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from engine.model.errors import UnsupportedModelError


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Long wavelengths divided by `factor`, short ones kept, a linear blend between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Every position divided by `factor`."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """Interpolated where a dimension turns seldom, kept where it turns often; cos and sin scaled by `attention`."""

    factor: float
    beta_fast: float
    beta_slow: float
    original_context: int
    attention: float
    truncate: bool


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Base, rotated width (all of head_dim) and scaling."""

    theta: float
    head_dim: int
    scaling: Llama3Scaling | LinearScaling | YarnScaling | None

    @classmethod
    def from_hf(
        cls,
        *,
        parameters: Mapping[str, Any],
        theta: float,
        partial_rotary_factor: float,
        head_dim: int,
        max_position_embeddings: int,
    ) -> RopeConfig:
        """From `rope_parameters` (transformers 5) or `rope_scaling` with a separate `rope_theta` (before).

        Raises `UnsupportedModelError` naming a scaling or a partial rotation the native decoder does not have.
        """
        kind = str(parameters.get("rope_type", parameters.get("type", "default")))
        theta = float(parameters.get("rope_theta") or theta)
        partial = float(parameters.get("partial_rotary_factor") or partial_rotary_factor)
        if partial != 1.0:
            raise UnsupportedModelError(f"partial_rotary_factor {partial}, the native decoder rotates whole heads only")
        original = int(parameters.get("original_max_position_embeddings") or max_position_embeddings)
        scaling: Llama3Scaling | LinearScaling | YarnScaling | None
        if kind == "default":
            scaling = None
        elif kind == "linear":
            scaling = LinearScaling(factor=float(parameters["factor"]))
        elif kind == "llama3":
            scaling = Llama3Scaling(
                factor=float(parameters["factor"]),
                low_freq_factor=float(parameters["low_freq_factor"]),
                high_freq_factor=float(parameters["high_freq_factor"]),
                original_context=original,
            )
        elif kind == "yarn":
            scaling = _yarn(parameters, original, max_position_embeddings)
        else:
            raise UnsupportedModelError(f"rope_type {kind!r} is none of default, linear, llama3, yarn")
        return cls(theta=theta, head_dim=head_dim, scaling=scaling)

    def inverse_frequencies(self) -> torch.Tensor:
        """float32 [head_dim / 2]."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.int64).to(torch.float32) / self.head_dim
        plain = 1.0 / (self.theta**exponents)
        match self.scaling:
            case None:
                return plain
            case LinearScaling(factor=factor):
                return plain / factor
            case Llama3Scaling() as scaling:
                return _llama3_frequencies(plain, scaling)
            case YarnScaling() as scaling:
                return _yarn_frequencies(plain, scaling, self.theta)

    def table(self, num_positions: int) -> torch.Tensor:
        """float32 [num_positions, head_dim]: cos in the first half of each row, sin in the second."""
        angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), self.inverse_frequencies())
        attention = self.scaling.attention if isinstance(self.scaling, YarnScaling) else 1.0
        return torch.cat((angles.cos() * attention, angles.sin() * attention), dim=1).contiguous()


def _yarn(parameters: Mapping[str, Any], original: int, max_position_embeddings: int) -> YarnScaling:
    factor = float(parameters.get("factor") or max_position_embeddings / original)

    def stretch(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention = parameters.get("attention_factor")
    if attention is None:
        mscale, mscale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
        attention = stretch(mscale) / stretch(mscale_all) if mscale and mscale_all else stretch(1.0)
    return YarnScaling(
        factor=factor,
        beta_fast=float(parameters.get("beta_fast") or 32),
        beta_slow=float(parameters.get("beta_slow") or 1),
        original_context=original,
        attention=float(attention),
        truncate=bool(parameters.get("truncate", True)),
    )


def _llama3_frequencies(plain: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    turns = scaling.original_context * plain / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
    return (1 - keep) * plain / scaling.factor + keep * plain


def _yarn_frequencies(plain: torch.Tensor, scaling: YarnScaling, theta: float) -> torch.Tensor:
    head_dim = 2 * plain.numel()

    def dimension_turning(turns: float) -> float:
        """The (fractional) dimension that turns this often within the original context."""
        return head_dim * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_turning(scaling.beta_fast), dimension_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    interpolate = ((torch.arange(plain.numel(), dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain / scaling.factor * interpolate + plain * (1 - interpolate)
