"""Sampling: logits to tokens, vectorised over the batch, a pure function of each sequence's own seed and tokens."""

from engine.sampling.row import Sampled, SampleRow
from engine.sampling.sampler import LogitsError, Sampler
from engine.sampling.scores import RowScores

__all__ = ["LogitsError", "RowScores", "SampleRow", "Sampled", "Sampler"]
