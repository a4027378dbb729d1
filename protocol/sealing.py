"""Tags on the frames of an authenticated link: nobody on the way can change, add, leave out or repeat one.

Each direction of a link has a key of its own, made of the cluster secret and both nonces of the handshake
(`handshake.link_keys`), and counts its frames. A seal belongs to one end of one link, and ends with it.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass

TAG_BYTES = 16


class FrameSeal:
    """Tags the frames of one direction, one after the other."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._frames = 0

    def tag(self, body: bytes) -> bytes:
        """Of the next frame."""
        self._frames += 1
        return hmac.digest(self._key, self._frames.to_bytes(8, "big") + body, "sha256")[:TAG_BYTES]

    def is_next(self, tag: bytes, body: bytes) -> bool:
        """Whether this is the next frame, as the other end sent it."""
        return hmac.compare_digest(tag, self.tag(body))


@dataclass(frozen=True, kw_only=True)
class LinkSeals:
    """What one end of an authenticated link has."""

    outgoing: FrameSeal
    incoming: FrameSeal
