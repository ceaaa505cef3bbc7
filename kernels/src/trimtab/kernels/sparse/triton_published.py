"""FSA's passes as published, on a GPU: maxima, partial outputs by blocks of keys, and their merge.

`published` is the same in torch, and says where this differs from the authors' code.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False, check-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from trimtab.kernels.sparse.triton_selected import LEAST, LOG2_E, _dot, _rows, _tile


@triton.jit
def _logits(
    q,
    k,
    rows,
    query,
    row,
    chunk,
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
    """One chunk of one block's queries: logits to base 2, which are visible, and where they lie."""
    kv_head = row // blocks
    block = row % blocks
    at, there, token, head = _rows(row, chunk * ROWS, rows, query, kv_head, GROUP, ROWS)
    queries = _tile(q, token, head, there, HEADS, D, PAD)
    key = tl.load(block_first + block) + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < tl.load(block_length + block)
    keys = _tile(k, key, kv_head, inside, HEADS // GROUP, D, PAD)
    own = tl.load(last + token, mask=there, other=-1)
    visible = inside[None, :] & (key[None, :] <= own[:, None])
    logits = _dot(queries, tl.trans(keys), WIDEN) * (scale * LOG2_E)
    return tl.where(visible, logits, LEAST), visible, at, there, key, inside, kv_head


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
        logits, _visible, at, there, _key, _inside, _kv_head = _logits(
            q,
            k,
            rows,
            query,
            row,
            chunk,
            block_first,
            block_length,
            last,
            scale,
            blocks,
            HEADS,
            GROUP,
            D,
            PAD,
            BLOCK,
            ROWS,
            WIDEN,
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
        logits, visible, at, there, key, inside, kv_head = _logits(
            q,
            k,
            rows,
            query,
            row,
            chunk,
            block_first,
            block_length,
            last,
            scale,
            blocks,
            HEADS,
            GROUP,
            D,
            PAD,
            BLOCK,
            ROWS,
            WIDEN,
        )
        shift = tl.load(running + at, mask=there, other=0.0)
        p = tl.where(visible, tl.exp2(logits - shift[:, None]), 0.0)
        values = _tile(v, key, kv_head, inside, HEADS // GROUP, D_V, PAD_V)
        wide = tl.arange(0, PAD_V)
        tl.store(part_sum + at, tl.sum(p, 1), mask=there)
        tl.store(
            part + at[:, None] * D_V + wide[None, :],
            _dot(p.to(values.dtype), values, WIDEN),
            mask=there[:, None] & (wide < D_V)[None, :],
        )


@triton.jit
def merge(
    part,
    running,
    part_sum,
    place,
    out,
    lse,
    queries,
    TOP: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    D_V: tl.constexpr,
    PAD_V: tl.constexpr,
):
    """Adds up the parts of one query's group in the order of its blocks, each time rescaled."""
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    member = tl.arange(0, GROUP_PAD)
    column = tl.arange(0, PAD_V)
    there = member < GROUP
    both = there[:, None] & (column < D_V)[None, :]
    top = tl.full((GROUP_PAD,), LEAST, tl.float32)
    total = tl.zeros((GROUP_PAD,), tl.float32)
    acc = tl.zeros((GROUP_PAD, PAD_V), tl.float32)
    for slot in range(TOP):
        entry = tl.load(place + (kv_head * queries + token) * TOP + slot).to(tl.int64)
        at = entry * GROUP + member
        known = there & (at >= 0)
        new = tl.where(known, tl.load(running + at, mask=known, other=0.0), top)
        kept = tl.exp2(top - new)
        its_out = tl.load(
            part + at[:, None] * D_V + column[None, :], mask=both & known[:, None], other=0.0
        )
        acc = acc * kept[:, None] + its_out
        total = total * kept + tl.load(part_sum + at, mask=known, other=0.0)
        top = new
    seen = total > 0
    safe = tl.where(seen, total, 1.0)
    head = kv_head * GROUP + member
    tl.store(
        out + (token * HEADS + head)[:, None] * D_V + column[None, :],
        (acc / safe[:, None]).to(out.dtype.element_ty),
        mask=both,
    )
    logarithm = tl.where(seen, (top + tl.log2(safe)) / LOG2_E, float("-inf"))
    tl.store(lse + token * HEADS + head, logarithm, mask=there)
