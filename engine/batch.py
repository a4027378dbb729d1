"""What one forward pass works on: the packed tokens of several sequences, as flat tensors.

A `Batch` is made by `pack_batch`, a pure function of the scheduled pieces, lives for one step and is never changed.
Tokens of one sequence lie side by side; there is no padding but in the page table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Tokens to compute now, on the CPU; a model moves them where it needs them."""

    token_ids: torch.Tensor
    """int64 `[tokens]`."""
    positions: torch.Tensor
    """int64 `[tokens]`: each token's index in its own sequence."""
    slots: torch.Tensor
    """int64 `[tokens]`: page * page_size + offset, where this token's K and V are written."""
    query_start: torch.Tensor
    """int32 `[seqs + 1]`: sequence `i` owns tokens `query_start[i]` up to `query_start[i + 1]`."""
    kv_lens: torch.Tensor
    """int32 `[seqs]`: tokens each sequence attends to, those of this step included."""
    page_table: torch.Tensor
    """int32 `[seqs, max_pages]`: pages in order of position, padded with 0."""
    logit_rows: torch.Tensor
    """int64 `[rows]`: indices into the tokens whose logits are wanted, ascending."""

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_seqs(self) -> int:
        return self.kv_lens.shape[0]


class Piece(msgspec.Struct, frozen=True):
    """The part of one sequence that one step computes: its tokens `start` up to `end`."""

    tokens: npt.NDArray[np.int64]
    """`[>= end]`: the sequence from its first token on."""
    pages: npt.NDArray[np.int32]
    """`[>= ceil(end / page_size)]`: the pages of the sequence in order."""
    start: int
    end: int
    num_logits: int
    """After how many of its last tokens the logits are needed."""


def pack_batch(pieces: Sequence[Piece], *, page_size: int) -> Batch:
    """Lay `pieces` (at least one, none empty) side by side. Pure: the same pieces give the same tensors.

    Cost is a few array copies per sequence; positions and slots are computed for the whole batch at once.
    """
    num_seqs = len(pieces)
    starts = np.fromiter((piece.start for piece in pieces), np.int64, num_seqs)
    ends = np.fromiter((piece.end for piece in pieces), np.int64, num_seqs)
    counts = ends - starts
    assert int(counts.min()) > 0, "every sequence of a batch has at least one token to compute"
    query_start = np.zeros(num_seqs + 1, np.int64)
    np.cumsum(counts, out=query_start[1:])
    num_pages = -(-ends // page_size)

    token_ids = np.empty(int(query_start[-1]), np.int64)
    page_table = np.zeros((num_seqs, int(num_pages.max())), np.int32)
    bounds = query_start.tolist()
    page_counts = num_pages.tolist()
    for index, piece in enumerate(pieces):
        token_ids[bounds[index] : bounds[index + 1]] = piece.tokens[piece.start : piece.end]
        page_table[index, : page_counts[index]] = piece.pages[: page_counts[index]]

    sequence_of = np.repeat(np.arange(num_seqs), counts)
    positions = np.arange(token_ids.shape[0]) + (starts - query_start[:-1])[sequence_of]
    page_index = positions // page_size
    slots = page_table[sequence_of, page_index].astype(np.int64) * page_size + (positions - page_index * page_size)
    wanted = np.fromiter((piece.num_logits for piece in pieces), np.int64, num_seqs)
    rows_until = np.cumsum(wanted)
    return Batch(
        token_ids=torch.from_numpy(token_ids),
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(slots),
        query_start=torch.from_numpy(query_start.astype(np.int32)),
        kv_lens=torch.from_numpy(ends.astype(np.int32)),
        page_table=torch.from_numpy(page_table),
        logit_rows=torch.from_numpy(np.repeat(query_start[1:] - rows_until, wanted) + np.arange(rows_until[-1])),
    )
