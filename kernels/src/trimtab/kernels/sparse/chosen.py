"""What every way to do selected attention is given, and the segments in which it is done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimtab.kernels.sparse import launch_tables, tables
from trimtab.kernels.sparse.tables import BlockMajor, Blocks, Queries
from trimtab.kernels.sparse.tiles import wide

_COUNTED_BYTES, _SORTED_BYTES = 24, 48
"""What a choice takes at most while its table is made: by counting, and where that cannot be."""


@dataclass(frozen=True, slots=True)
class Lot:
    """Segments that share an index table: all are of so many KV heads and queries.

    A segment has some queries of one KV head, or all queries of some.
    """

    kv: slice
    part: slice
    heads: int
    """KV heads of each segment."""
    step: int
    """Queries of each but the last of a KV head."""
    busy: int
    """Of these, those that have chosen any block, at most."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """Packed queries, keys and values, and the blocks that each query has chosen."""

    q: Tensor
    """``[queries, heads, d]``."""
    k: Tensor
    v: Tensor
    ids: Tensor
    """Numbered through, ``[kv_heads, queries, top]``; -1 is none."""
    block: int
    scale: float
    queries: Queries
    blocks: Blocks
    workspace_bytes: int

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def top(self) -> int:
        """Slots of each query."""
        return self.ids.shape[-1]

    def unwritten(self) -> tuple[Tensor, Tensor]:
        """Room for the output and the natural logarithm."""
        out = self.q.new_empty(*self.q.shape[:2], self.v.shape[-1])
        return out, wide(self.q[:0]).new_empty(self.q.shape[:2])

    def segments(self, part_bytes: int) -> Iterator[tuple[slice, BlockMajor]]:
        """Queries whose partial results fit the workspace, and their table.

        Args:
            part_bytes: what one query, head and slot takes.
        """
        count = self.q.shape[0]
        step = max(1, self.workspace_bytes // max(1, self.q.shape[1] * self.top * part_bytes))
        for begin in range(0, count, step):
            part = slice(begin, min(count, begin + step))
            yield part, tables.block_major(self.ids[:, part], self.blocks.first.numel())

    def lots(self, part_bytes: int, *, shared: bool, busy: int | None = None) -> Iterator[Lot]:
        """Segments of KV heads and queries whose partial results fit the workspace.

        They have as many queries of a KV head as fit, so that lists are long and a block's keys are
        read few times, and more KV heads only where all queries fit.

        Args:
            part_bytes: what one query, head and slot takes.
            shared: whether segments share tables, which then fit the workspace too.
            busy: queries that have chosen any block, at most; all by default.
        """
        count, kv_heads, room = self.q.shape[0], self.k.shape[1], self.workspace_bytes
        busy = count if busy is None else busy
        fit = max(1, room // max(1, self.group * self.top * part_bytes))
        slot_bytes = _COUNTED_BYTES if self.top <= launch_tables.LONGEST_INVERTED else _SORTED_BYTES
        listed = max(1, room // (self.top * slot_bytes))
        most = min(fit if busy > fit else count, listed if shared else count)
        pieces = -(-count // most)
        step = -(-count // pieces)
        pieces = -(-count // step)
        listed //= step
        heads = max(1, min(kv_heads, fit // max(1, busy), listed))
        together = listed // heads if shared else 1
        lines = heads * max(1, together // pieces)
        queries = step * max(1, min(pieces, together))
        whole = kv_heads // heads * heads
        for first, end, each in ((0, whole, heads), (whole, kv_heads, kv_heads - whole)):
            for kv in range(first, end, lines):
                for begin in range(0, count, queries):
                    part = slice(begin, min(count, begin + queries))
                    yield Lot(slice(kv, min(end, kv + lines)), part, each, step, min(step, busy))

    def halved(self) -> Chosen:
        """The same in blocks of half as many tokens, two for each that was chosen."""
        half = self.block // 2
        sides = torch.arange(2, dtype=self.ids.dtype, device=self.ids.device)
        ids = (self.ids[..., None] * 2 + sides).masked_fill((self.ids < 0)[..., None], -1)
        blocks = Blocks(
            (self.blocks.first[:, None] + sides * half).flatten(),
            (self.blocks.length[:, None] - sides * half).clamp(0, half).flatten(),
            self.blocks.sequence.repeat_interleave(2),
            self.blocks.before * 2,
        )
        return replace(self, ids=ids.flatten(-2), block=half, blocks=blocks)
