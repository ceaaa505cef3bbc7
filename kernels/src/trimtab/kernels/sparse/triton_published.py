"""FSA's passes as published, on a GPU: maxima, and partial outputs by blocks of keys.

`triton_selected.merge` merges them, not yet normalised. `published` is the same in torch, and says
where this differs from the authors' code.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False, check-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from trimtab.kernels.sparse.triton_selected import _dot, _logits, _put, _tile


@triton.jit
def maxima(
    q,
    k,
    part_max,
    rows,
    query,
    item_row,
    item_chunk,
    block_first,
    block_length,
    last,
    scale,
    blocks,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The greatest logit, to base 2, of each query and head in the block."""
    row = tl.load(item_row + tl.program_id(0)).to(tl.int64)
    if row >= 0:
        chunk = tl.load(item_chunk + tl.program_id(0)).to(tl.int64)
        lists = (rows, query, block_first, block_length, last)
        logits, _visible, at, there, _key, _inside, _kv_head = _logits(
            q, k, lists, row, chunk, scale, blocks, HEADS, GROUP, D, PAD, BLOCK, ROWS, WIDEN
        )
        tl.store(part_max + at, tl.max(logits, 1), mask=there)


@triton.jit
def forward(
    q,
    k,
    v,
    part,
    running,
    part_sum,
    rows,
    query,
    item_row,
    item_chunk,
    block_first,
    block_length,
    last,
    scale,
    blocks,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    PAD: tl.constexpr,
    PAD_V: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Partial outputs and sums of the block, shifted by the maxima up to it."""
    row = tl.load(item_row + tl.program_id(0)).to(tl.int64)
    if row >= 0:
        chunk = tl.load(item_chunk + tl.program_id(0)).to(tl.int64)
        lists = (rows, query, block_first, block_length, last)
        logits, visible, at, there, key, inside, kv_head = _logits(
            q, k, lists, row, chunk, scale, blocks, HEADS, GROUP, D, PAD, BLOCK, ROWS, WIDEN
        )
        shift = tl.load(running + at, mask=there, other=0.0)
        p = tl.where(visible, tl.exp2(logits - shift[:, None]), 0.0)
        values = _tile(v, key, kv_head, inside, HEADS // GROUP, D_V, PAD_V)
        tl.store(part_sum + at, tl.sum(p, 1), mask=there)
        _put(part, at, 0, there, _dot(p.to(values.dtype), values, WIDEN), 1, D_V, PAD_V)
