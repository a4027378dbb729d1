"""xxh3-64 checksums of KV pages: what the owner of pages states and their receiver verifies.

xxh3 is faster than memory, so its cost is that of reading the page once, and nearly nothing where the page is still in
the cache. The value 0 means "not verified" on the wire; a page whose real hash is 0 goes unverified once in 2**64.
"""

from __future__ import annotations

from collections.abc import Sequence

import xxhash


def page_checksums(view: memoryview, page_bytes: int, pages: Sequence[int]) -> list[int]:
    """The xxh3-64 of each page in `pages`, in their order; page `i` is `view[i * page_bytes : (i + 1) * page_bytes]`.

    Raises `ValueError` for a page that is not wholly inside `view`. The interpreter lock is free while hashing.
    """
    num_pages = view.nbytes // page_bytes
    if pages and not (min(pages) >= 0 and max(pages) < num_pages):
        raise ValueError(f"pages {min(pages)} to {max(pages)} asked for, of a pool of {num_pages}")
    digest = xxhash.xxh3_64_intdigest
    return [digest(view[page * page_bytes : (page + 1) * page_bytes]) for page in pages]
