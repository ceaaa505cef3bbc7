"""Which beginnings of prompts a server has seen, and so may still have in its prefix cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from zlib import crc32

BLOCK_BYTES = 256
_MOST_BLOCKS = 256
_REMEMBERED = 32_768
"""8 MiB of text, about what the cache of a large server holds; it takes some 4 MB here."""


def blocks_of(prompt: bytes) -> tuple[int, ...]:
    """The hashes of a prompt's beginnings, one for each whole block; at most 64 KiB are looked at.

    As in vLLM's prefix cache, a block's hash covers all that is before it.
    """
    count = min(len(prompt) // BLOCK_BYTES, _MOST_BLOCKS)
    hashes = []
    low = high = 0
    for start in range(0, count * BLOCK_BYTES, BLOCK_BYTES):
        block = prompt[start : start + BLOCK_BYTES]
        low, high = crc32(block, low), crc32(block, high ^ 0x9E3779B9)
        hashes.append(high << 32 | low)
    return tuple(hashes)


class PrefixMemory:
    """The blocks that a server saw last, the longest unseen forgotten first."""

    def __init__(self) -> None:
        self._seen: OrderedDict[int, None] = OrderedDict()

    def saw(self, blocks: Sequence[int]) -> None:
        """The server has read a prompt."""
        for block in reversed(blocks):  # a beginning outlives what follows it
            self._seen[block] = None
            self._seen.move_to_end(block)
        while len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)

    def known_bytes(self, blocks: Sequence[int]) -> int:
        """How much of a prompt's beginning the server has seen."""
        known = 0
        for block in blocks:
            if block not in self._seen:
                break
            known += BLOCK_BYTES
        return known

    def forget(self) -> None:
        """The server was started anew."""
        self._seen.clear()
