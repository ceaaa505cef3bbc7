"""Whether the selected branch's forward goes block by block or query by query on a GPU.

By blocks, each block's keys are read once for many queries, but partial results go through memory.
By queries, nothing is kept, but each query reads its blocks from the L2 cache. What decides is the
shape of the heads alone, so that a query gets the same bits in calls of any length. The rates are
an H200's, as the model of times in `trimtab.sparse` has them. Nobody has timed either way.
"""

from __future__ import annotations

from dataclasses import dataclass

L2_BYTES_PER_S = 5.6e12
PARTS_BYTES_PER_S = 1.45e12
"""At which published FSA's main kernel and merge move their bytes."""

LARGEST_GROUP = 32
"""Beyond it a query's heads do not fit a tile."""


@dataclass(frozen=True, slots=True)
class SelectedPlan:
    """What one block of one query takes either way, for all heads of a group, as is predicted."""

    path: str
    """``queries`` or ``blocks``."""
    by_queries_s: float
    by_blocks_s: float
    why: str

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
    if group > LARGEST_GROUP:
        path, why = "blocks", f"a group of {group} is larger than a tile of {LARGEST_GROUP}"
    elif by_queries_s < by_blocks_s:
        path, why = "queries", f"{group} heads share the keys that a query reads"
    else:
        path, why = "blocks", f"a query would read its blocks for {group} heads only"
    return SelectedPlan(path, by_queries_s, by_blocks_s, why)
