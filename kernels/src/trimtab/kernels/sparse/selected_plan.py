"""Whether the selected branch's forward goes block by block or query by query on a GPU.

By blocks, each block's keys are read once for many queries, but partial results go through memory.
By queries, nothing is kept, but each query reads its blocks from the L2 cache. What decides is the
shape of the heads alone, so that a query gets the same bits in calls of any length. The rates are
an H200's, as the model of times in `trimtab.sparse` has them. Nobody has timed either way.
"""

from __future__ import annotations

from dataclasses import dataclass

L2_BYTES_PER_S = 5.6e12
PARTS_BYTES_PER_S = 1.6e12
"""At which published FSA's main kernel and merge move their bytes."""

DENSE_FLOP_PER_S = {2: 2.84e14, 4: 3e13}
"""Of attention that shares keys among the queries of a tile, by bytes of a number: Triton's dense
attention as FSA's paper has it, and half of what an H200 can do without tensor cores."""

FORCED = 3
"""Blocks that every query of NSA's has: the first, its own and that before."""

MOST_NEAR = 56
"""Blocks of a sequence at most that early queries attend to so: their ids fit a word of 64 bits,
with the blocks of one tile more."""

LARGEST_GROUP = 32
"""Beyond it a query's heads do not fit a tile."""


@dataclass(frozen=True, slots=True)
class SelectedPlan:
    """What one block of one query takes either way, for all heads of a group, as is predicted."""

    path: str
    """``queries`` or ``blocks``."""
    by_queries_s: float
    by_blocks_s: float
    dense_keys: float
    """Keys that all heads of a group attend to densely in what a block takes by blocks."""
    why: str

    def dense_until(self, top: int, block: int) -> int:
        """Until which token of a sequence its queries had better attend to all blocks by tiles.

        By blocks, what is not forced is written and read in parts, however short the sequence.
        """
        forced = FORCED * block
        fair = forced + self.dense_keys * max(0, top - FORCED)
        most = min(max(top * block, fair), MOST_NEAR * block)
        return int(most // block) * block

    def explain(self) -> str:
        """One sentence: the path, why, and the figures behind it."""
        return (
            f"by {self.path}, since {self.why}: predicted {1e9 * self.by_queries_s:.1f} ns a block"
            f" and query by queries, and {1e9 * self.by_blocks_s:.1f} ns by blocks"
        )


def plan_selected(group: int, d: int, d_v: int, block: int, item_bytes: int) -> SelectedPlan:
    """Chooses the way of the forward.

    Args:
        group: query heads of a KV head.
        d: dimension of queries and keys.
        d_v: of values.
        block: tokens of a block.
        item_bytes: of a number.
    """
    by_queries_s = block * (d + d_v) * item_bytes / L2_BYTES_PER_S
    row_bytes = d * item_bytes + 2 * (d_v * item_bytes + 8) + 12
    by_blocks_s = group * row_bytes / PARTS_BYTES_PER_S
    dense_s = group * 2 * (d + d_v) / DENSE_FLOP_PER_S[item_bytes]
    if group > LARGEST_GROUP:
        path, why = "blocks", f"a group of {group} is larger than a tile of {LARGEST_GROUP}"
    elif by_queries_s < by_blocks_s:
        path, why = "queries", f"{group} heads share the keys that a query reads"
    else:
        path, why = "blocks", f"a query would read its blocks for {group} heads only"
    return SelectedPlan(path, by_queries_s, by_blocks_s, by_blocks_s / dense_s, why)
