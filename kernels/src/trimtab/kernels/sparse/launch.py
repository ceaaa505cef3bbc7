"""The Triton kernels called in order, in segments of queries that fit a workspace."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.kernels.sparse import tables
from trimtab.kernels.sparse.shape import SparseShape
from trimtab.kernels.sparse.tables import Blocks, Queries


@dataclass(frozen=True, slots=True)
class Tile:
    """How a kernel is launched: rows of its tile, warps, and stages of its pipeline."""

    rows: int
    warps: int
    stages: int


FORWARD = Tile(rows=64, warps=4, stages=2)
SELECT = Tile(rows=32, warps=4, stages=2)
SELECT_ENTRIES = 64
MERGE = Tile(rows=1, warps=4, stages=3)


def backward_tile(pad: int) -> Tile:
    """The widest tile whose sums stay in registers, for a padded head size."""
    return Tile(rows=32 if pad <= 128 else 16, warps=8, stages=1)


def padded(size: int) -> int:
    """The power of two, at least 16, that a tile needs for a dimension."""
    return max(16, 1 << (size - 1).bit_length())


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, as it must on a machine without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def block_sizes(q: Tensor, k: Tensor, v: Tensor, block: int) -> dict[str, Any]:
    """The constants of kernels that read blocks of keys."""
    return {
        "HEADS": q.shape[1],
        "GROUP": q.shape[1] // k.shape[1],
        "D": q.shape[2],
        "D_V": v.shape[2],
        "PAD": padded(q.shape[2]),
        "PAD_V": padded(v.shape[2]),
        "BLOCK": block,
        "WIDEN": interpreted() and q.dtype == torch.bfloat16,
    }


def segments(queries: int, bytes_per_query: int, most_bytes: int) -> Iterator[slice]:
    """Cuts queries so that what each segment writes fits a workspace."""
    step = max(1, most_bytes // max(1, bytes_per_query))
    for begin in range(0, queries, step):
        yield slice(begin, min(queries, begin + step))


def selected_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ids: Tensor,
    block: int,
    scale: float,
    queries: Queries,
    blocks: Blocks,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Output and natural logarithm of selected attention; ids are numbered through."""
    from trimtab.kernels.sparse import triton_selected as kernels

    out = q.new_empty(*q.shape[:2], v.shape[-1])
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    sizes = block_sizes(q, k, v, block)
    top, group = ids.shape[-1], sizes["GROUP"]
    bytes_per_query = q.shape[1] * top * (v.shape[-1] * q.element_size() + 8)
    for part in segments(q.shape[0], bytes_per_query, workspace_bytes):
        table = tables.block_major(ids[:, part], blocks.first.numel())
        items = tables.schedule(table, group, FORWARD.rows)
        entries = table.query.numel() * group
        partial = q.new_empty(entries, v.shape[-1])
        tops = q.new_empty(entries, dtype=torch.float32)
        sums = torch.empty_like(tops)
        kernels.forward[(items.row.numel(),)](
            *(q[part], k, v, partial, tops, sums, table.rows, table.query, items.row, items.chunk),
            *(blocks.first, blocks.length, queries.last[part], scale, blocks.first.numel()),
            **sizes,
            ROWS=FORWARD.rows,
            num_warps=FORWARD.warps,
            num_stages=FORWARD.stages,
        )
        kernels.merge[(part.stop - part.start, k.shape[1])](
            *(partial, tops, sums, table.place, out[part], lse[part], part.stop - part.start),
            TOP=top,
            HEADS=q.shape[1],
            GROUP=group,
            GROUP_PAD=1 << (group - 1).bit_length(),
            D_V=v.shape[-1],
            PAD_V=sizes["PAD_V"],
            num_warps=MERGE.warps,
            num_stages=MERGE.stages,
        )
    return out, lse


def selected_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ids: Tensor,
    block: int,
    scale: float,
    queries: Queries,
    blocks: Blocks,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, the same bits at every run."""
    from trimtab.kernels.sparse import triton_selected as kernels

    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
    delta = (gradient.float() * out.float()).sum(-1)
    sizes = block_sizes(q, k, v, block)
    tile = backward_tile(max(sizes["PAD"], sizes["PAD_V"]))
    top, group = ids.shape[-1], sizes["GROUP"]
    bytes_per_query = q.shape[1] * top * q.shape[-1] * 4
    for part in segments(q.shape[0], bytes_per_query, workspace_bytes):
        table = tables.block_major(ids[:, part], blocks.first.numel())
        partial = dk.new_empty(table.query.numel() * group, q.shape[-1])
        kernels.backward[(table.rows.numel() - 1,)](
            *(q[part], k, v, gradient[part], lse[part], delta[part], partial, dk, dv),
            *(table.rows, table.query, blocks.first, blocks.length, queries.last[part]),
            *(scale, blocks.first.numel()),
            **sizes,
            ROWS=tile.rows,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        kernels.sum_parts[(part.stop - part.start, k.shape[1])](
            *(partial, table.place, dq[part], part.stop - part.start),
            TOP=top,
            HEADS=q.shape[1],
            GROUP=group,
            GROUP_PAD=1 << (group - 1).bit_length(),
            D=q.shape[-1],
            PAD=sizes["PAD"],
            num_warps=MERGE.warps,
            num_stages=MERGE.stages,
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
    tiles = tables.cut(cu_queries, q.shape[0], SELECT.rows)
    begin = cu_entries.long()[tiles.sequence]
    common: dict[str, Any] = {
        "HEADS": q.shape[1],
        "GROUP": q.shape[1] // kv_heads,
        "D": q.shape[2],
        "PAD": padded(q.shape[2]),
        "QUERIES": SELECT.rows,
        "WIDEN": interpreted() and q.dtype == torch.bfloat16,
    }
    kernels.entry_logarithms[(tiles.first.numel(), q.shape[1])](
        *(q, entries, lse, tiles.first, tiles.length, begin, visible, scale),
        **common,
        ENTRIES=SELECT_ENTRIES,
        num_warps=SELECT.warps,
        num_stages=SELECT.stages,
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
        num_warps=SELECT.warps,
        num_stages=SELECT.stages,
    )
    return out
