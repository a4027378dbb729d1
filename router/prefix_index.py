"""What the router believes a replica's prefix cache holds: hashes of the blocks of tokens it sent there.

A prompt is cut into blocks of `BLOCK_TOKENS`; each block's hash covers all before it, so an equal hash means an equal
prefix. The belief is bounded and least recently used goes first, like the cache it imitates; being wrong costs time,
never correctness.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

BLOCK_TOKENS = 32


def prefix_chain(tokens: Sequence[int], *, namespace: str = "") -> list[int]:
    """One hash per full block of `tokens`; chains of different namespaces share nothing."""
    data = array("q", tokens).tobytes()
    step = BLOCK_TOKENS * 8
    chain: list[int] = []
    previous = hash(namespace)
    for start in range(0, len(data) - step + 1, step):
        previous = hash((previous, data[start : start + step]))
        chain.append(previous)
    return chain


class PrefixIndex:
    """The blocks one replica probably holds."""

    def __init__(self, *, max_tokens: int) -> None:
        self._max_blocks = max(1, max_tokens // BLOCK_TOKENS)
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def matched_tokens(self, chain: Sequence[int]) -> int:
        """How many leading tokens of the prompt with this chain are probably cached."""
        matched = 0
        for block in chain:
            if block not in self._blocks:
                break
            matched += 1
        return matched * BLOCK_TOKENS

    def clear(self) -> None:
        """The replica has dropped its cache."""
        self._blocks.clear()

    def record(self, chain: Sequence[int]) -> None:
        """Note that a prompt goes there."""
        # Last block first: then a prefix is never forgotten before what continues it.
        for block in reversed(chain[: self._max_blocks]):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._max_blocks:
            self._blocks.popitem(last=False)
