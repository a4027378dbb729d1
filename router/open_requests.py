"""The HTTP requests under way, by the names under which clients may have them ended.

A request enters when its sequences have begun and leaves when its response is written. Names are clients' own (`rid`)
and the response's id; several requests may share one.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence

from router.generation import Generation

_REMEMBERED = 1024


class OpenRequests:
    """Of one router, on its event loop."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._by_number: dict[int, dict[str, list[Generation]]] = {}
        self._by_name: dict[str, set[int]] = defaultdict(set)
        self._heard: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_number)

    def enter(self, response_id: str, names: Mapping[str, Sequence[int]], generations: Sequence[Generation]) -> int:
        """The number under which the request is to `leave`; `names` stand for sequences by their index."""
        number = next(self._numbers)
        by_index = {each.index: each for each in generations}
        called = {name: [by_index[index] for index in indices if index in by_index] for name, indices in names.items()}
        called[response_id] = list(generations)
        self._by_number[number] = called
        for name in called:
            self._by_name[name].add(number)
        return number

    def leave(self, number: int) -> None:
        """The response is written."""
        for name in self._by_number.pop(number):
            self._by_name[name].discard(number)
            if not self._by_name[name]:
                del self._by_name[name]

    def is_news(self, number: int) -> bool:
        """Whether that order to end requests was not heard before: the same one may come several ways."""
        if number in self._heard:
            return False
        self._heard[number] = None
        if len(self._heard) > _REMEMBERED:
            self._heard.popitem(last=False)
        return True

    def end(self, name: str | None) -> int:
        """End the sequences called so, or all; returns how many there were."""
        numbers = list(self._by_number) if name is None else list(self._by_name.get(name, ()))
        ended = 0
        for number in numbers:
            called = self._by_number[number]
            for generation in itertools.chain(*called.values()) if name is None else called[name]:
                ended += generation.cut_short()
        return ended
