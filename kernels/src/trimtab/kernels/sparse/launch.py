"""The Triton kernels called in order, in segments of queries that fit a workspace."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from trimtab.kernels.sparse import blockwise, tables
from trimtab.kernels.sparse.chosen import Chosen
from trimtab.kernels.sparse.gpu_tiles import (
    Need,
    Tile,
    fit_block,
    has_tile,
    merge_tile,
    padded,
    tile,
)
from trimtab.kernels.sparse.shape import SparseShape
from trimtab.kernels.sparse.tables import BlockMajor, Queries, Schedule

logger = logging.getLogger(__name__)


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, as it must on a machine without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def launched(how: Tile) -> dict[str, int]:
    """What Triton itself is told."""
    return {"num_warps": how.warps, "num_stages": how.stages}


@cache
def in_torch(kernel: str, need: Need) -> bool:
    """Whether no tile of a kernel holds heads so wide, which is said once."""
    if has_tile(kernel, need):
        return False
    logger.warning(
        "gradients of attention are computed in torch, not in Triton: no tile of %s holds heads"
        " %d wide, keys and values together, with %d bytes a number",
        *(kernel, need.width, need.item_bytes),
    )
    return True


def of_keys(q: Tensor, k: Tensor) -> dict[str, Any]:
    """The constants of kernels that read queries and keys."""
    return {
        "HEADS": q.shape[1],
        "GROUP": q.shape[1] // k.shape[1],
        "D": q.shape[2],
        "PAD": padded(q.shape[2]),
        "WIDEN": interpreted() and q.dtype == torch.bfloat16,
    }


def of_values(v: Tensor) -> dict[str, int]:
    """The constants of kernels that read or write values."""
    return {"D_V": v.shape[2], "PAD_V": padded(v.shape[2])}


def of_group(chosen: Chosen) -> dict[str, int]:
    """The constants of kernels that join the parts of one query's group."""
    group = chosen.group
    heads = {"HEADS": chosen.q.shape[1], "GROUP": group, "GROUP_PAD": 1 << (group - 1).bit_length()}
    how = merge_tile(group, max(chosen.q.shape[-1], chosen.v.shape[-1]))
    return {"TOP": chosen.top, **heads, **launched(how)}


def fitted(kernel: str, chosen: Chosen) -> tuple[Chosen, Tile]:
    """In blocks as small as the kernel's tiles need, and its tile."""
    need = Need.of(chosen.q, chosen.v)
    while chosen.block > fit_block(kernel, need, chosen.block):
        chosen = chosen.halved()
    return chosen, tile(kernel, need, chosen.block)


@dataclass(frozen=True, slots=True)
class Segment:
    """Queries whose parts fit the workspace, the table of their choices, and its work items."""

    part: slice
    table: BlockMajor
    items: Schedule


def segments(chosen: Chosen, how: Tile, part_bytes: int) -> Iterator[Segment]:
    """As `Chosen.segments`, with the work items of a tile."""
    for part, table in chosen.segments(part_bytes):
        yield Segment(part, table, tables.schedule(table, chosen.group, how.rows))


def pass_over_blocks(
    kind: Any, chosen: Chosen, how: Tile, of: Segment, written: tuple[Tensor, Tensor, Tensor]
) -> None:
    """One of the main kernel's passes over the blocks of a segment of queries.

    Args:
        kind: ``WHOLE``, ``MAXIMA`` or ``SHIFTED`` of `triton_selected`.
        chosen: in blocks that fit the tile.
        how: the tile.
        of: the segment.
        written: partial outputs, maxima and sums, by entry and head of the group.
    """
    from trimtab.kernels.sparse import triton_selected as kernels

    blocks, part, table, items = chosen.blocks, of.part, of.table, of.items
    kernels.forward[(items.row.numel(),)](
        *(chosen.q[part], chosen.k, chosen.v, *written),
        *(table.rows, table.query, items.row, items.chunk),
        *(blocks.first, blocks.length, chosen.queries.last[part]),
        *(chosen.scale, blocks.first.numel()),
        **of_keys(chosen.q, chosen.k),
        **of_values(chosen.v),
        **launched(how),
        BLOCK=chosen.block,
        ROWS=how.rows,
        PASS=kind.value,
    )


def merge(
    chosen: Chosen,
    of: Segment,
    parts: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    *,
    normalised: bool,
) -> None:
    """Joins the parts of a segment's queries: outputs, what each is shifted by, and sums."""
    from trimtab.kernels.sparse import triton_selected as kernels

    queries = of.part.stop - of.part.start
    kernels.merge[(queries, chosen.k.shape[1])](
        *(*parts, of.table.place, out[of.part], lse[of.part], queries),
        **of_group(chosen),
        **of_values(chosen.v),
        NORMALISED=normalised,
    )


def selected_forward(chosen: Chosen) -> tuple[Tensor, Tensor]:
    """Output and natural logarithm of selected attention."""
    from trimtab.kernels.sparse.triton_selected import WHOLE

    chosen, how = fitted("forward", chosen)
    q, v = chosen.q, chosen.v
    out, lse = chosen.unwritten()
    for of in segments(chosen, how, v.shape[-1] * q.element_size() + 8):
        entries = of.table.query.numel() * chosen.group
        parts = q.new_empty(entries, v.shape[-1]), lse.new_empty(entries), lse.new_empty(entries)
        pass_over_blocks(WHOLE, chosen, how, of, parts)
        merge(chosen, of, parts, out, lse, normalised=True)
    return out, lse


def selected_backward(
    gradient: Tensor, out: Tensor, lse: Tensor, chosen: Chosen
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, the same bits at every run."""
    from trimtab.kernels.sparse import triton_selected as kernels

    if in_torch("backward", Need.of(chosen.q, chosen.v)):
        return blockwise.backward(gradient, out, lse, chosen)
    chosen, how = fitted("backward", chosen)
    q, k, v, blocks = chosen.q, chosen.k, chosen.v, chosen.blocks
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
    delta = (gradient.float() * out.float()).sum(-1)
    for part, table in chosen.segments(q.shape[-1] * 4):
        partial = dk.new_empty(table.query.numel() * chosen.group, q.shape[-1])
        kernels.backward[(table.rows.numel() - 1,)](
            *(q[part], k, v, gradient[part], lse[part], delta[part], partial, dk, dv),
            *(table.rows, table.query, blocks.first, blocks.length, chosen.queries.last[part]),
            *(chosen.scale, blocks.first.numel()),
            **of_keys(q, k),
            **of_values(v),
            **launched(how),
            BLOCK=chosen.block,
            ROWS=how.rows,
        )
        kernels.sum_parts[(part.stop - part.start, k.shape[1])](
            *(partial, table.place, dq[part], part.stop - part.start),
            **of_group(chosen),
            D=q.shape[-1],
            PAD=padded(q.shape[-1]),
        )
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def select(
    q: Tensor,
    entries: Tensor,
    cu_queries: Tensor,
    cu_entries: Tensor,
    visible: Tensor,
    queries: Queries,
    shape: SparseShape,
    scale: float,
) -> Tensor:
    """The best blocks of each query, ``[kv_heads, queries, top]`` int32, ascending."""
    from trimtab.kernels.sparse import triton_select as kernels

    kv_heads = entries.shape[1]
    out = torch.empty(kv_heads, q.shape[0], shape.top, dtype=torch.int32, device=q.device)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    how = tile("select", Need.of(q, entries), shape.block)
    tiles = tables.cut(cu_queries, q.shape[0], how.rows)
    begin = cu_entries.long()[tiles.sequence]
    common = {**of_keys(q, entries), **launched(how), "QUERIES": how.rows}
    kernels.entry_logarithms[(tiles.first.numel(), q.shape[1])](
        *(q, entries, lse, tiles.first, tiles.length, begin, visible, scale),
        **common,
        ENTRIES=how.columns,
    )
    kernels.best_blocks[(tiles.first.numel(), kv_heads)](
        *(q, entries, lse, out, tiles.first, tiles.length, begin, visible, queries.own),
        *(q.shape[0], scale),
        **common,
        PER_BLOCK=shape.entries_per_block,
        REACH=shape.reach,
        OUTER=shape.window // shape.stride,
        FIRST=shape.first,
        RECENT=shape.recent,
        TOP=shape.top,
        KEPT=max(16, padded(shape.top)),
    )
    return out
