"""Tiny random models in the shapes of real architectures, made by transformers, and ways to run ours beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from engine.batch import Piece, pack_batch
from engine.kv_spec import KVPool
from engine.model.loader import LoadedModel

VOCAB = 160
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def save_random_model(config: PretrainedConfig, folder: Path, *, seed: int = 0, shard: str = "1GB") -> PreTrainedModel:
    """A float32 model of `config` with weights large enough that every part of it shows in the logits."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
            else:
                parameter.normal_(1, 0.3)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def random_sequences(lengths: Sequence[int], *, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB, length).tolist() for length in lengths]


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, tokens: Sequence[int]) -> torch.Tensor:
    """float32 `[tokens, vocab]` by transformers itself."""
    logits: torch.Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits.float()


class PagedRun:
    """Sequences in pages scattered over a pool, computed piece by piece."""

    def __init__(self, model: LoadedModel, sequences: Sequence[Sequence[int]], *, page_size: int = 4) -> None:
        self.model = model
        self._tokens = [np.asarray(tokens, np.int64) for tokens in sequences]
        counts = [-(-len(tokens) // page_size) for tokens in sequences]
        shuffled = np.random.default_rng(1).permutation(sum(counts) + 3).astype(np.int32)
        self._pages = np.split(shuffled[: sum(counts)], np.cumsum(counts)[:-1])
        self._pool = KVPool(spec=model.kv_spec(page_size), num_pages=len(shuffled))
        self._pool.data.fill_(float("nan"))  # a slot read before it is written shows at once
        self._done = [0] * len(sequences)
        self.logits = [torch.zeros(len(tokens), model.config.vocab_size) for tokens in sequences]

    def step(self, counts: dict[int, int]) -> None:
        """Compute the next `counts[i]` tokens of each sequence `i` in one batch, and keep all their logits."""
        pieces = []
        for index, count in counts.items():
            start = self._done[index]
            end = min(start + count, len(self._tokens[index]))
            pieces.append(Piece(self._tokens[index], self._pages[index], start, end, True))
            self._done[index] = end
        batch = pack_batch(pieces, page_size=self._pool.spec.page_size)
        batch = dataclasses.replace(batch, logit_rows=torch.arange(batch.num_tokens))
        logits = self.model.forward(batch, self._pool)
        bounds = batch.query_start.tolist()
        for place, (index, piece) in enumerate(zip(counts, pieces, strict=True)):
            self.logits[index][piece.start : piece.end] = logits[bounds[place] : bounds[place + 1]]

    def finish(self, count: int) -> None:
        """Go on with `count` tokens of every unfinished sequence in each batch, until all are done."""
        while left := {i: count for i, tokens in enumerate(self._tokens) if self._done[i] < len(tokens)}:
            self.step(left)
