"""Selected attention on a GPU, a KV block at a time: its keys are read once for all their queries.

FSA's loop order (arXiv 2508.18224, section 3) with three changes. All heads of a group share a
tile, so that short lists still fill it. Each part of a query's softmax is normalised by its own
maximum, so that no shift can overflow and no pass before is needed. The lists are compressed rows.
Kernels see blocks and queries numbered through, and so know nothing of sequences.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(-1.0e30)


@triton.jit
def _rows(row, offset, rows, query, kv_head, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Entries of a row that a tile holds: entry, query, head, whether it is there."""
    begin = tl.load(rows + row)
    end = tl.load(rows + row + 1)
    at = begin * GROUP + offset + tl.arange(0, ROWS)
    there = at < end * GROUP
    entry = at // GROUP
    token = tl.load(query + entry, mask=there, other=0).to(tl.int64)
    return at, there, token, kv_head * GROUP + at % GROUP


@triton.jit
def _tile(pointer, token, head, there, HEADS: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr):
    """Rows ``[ROWS, PAD]`` of a tensor ``[tokens, heads, D]``."""
    column = tl.arange(0, PAD)
    address = (token * HEADS + head)[:, None] * D + column[None, :]
    return tl.load(pointer + address, mask=there[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def _dot(a, b, WIDEN: tl.constexpr):
    """A product in float32; ``WIDEN`` for the interpreter, which takes bfloat16 for integers."""
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def forward(
    q,
    k,
    v,
    part,
    part_max,
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
    """One chunk of one block's queries: normalised partial outputs, their maxima and sums."""
    row = tl.load(item_row + tl.program_id(0)).to(tl.int64)
    if row >= 0:
        kv_head = row // blocks
        block = row % blocks
        offset = tl.load(item_chunk + tl.program_id(0)).to(tl.int64) * ROWS
        at, there, token, head = _rows(row, offset, rows, query, kv_head, GROUP, ROWS)
        queries = _tile(q, token, head, there, HEADS, D, PAD)
        first = tl.load(block_first + block)
        column = tl.arange(0, BLOCK)
        inside = column < tl.load(block_length + block)
        keys = _tile(k, first + column, kv_head, inside, HEADS // GROUP, D, PAD)
        logits = _dot(queries, tl.trans(keys), WIDEN) * (scale * LOG2_E)
        own = tl.load(last + token, mask=there, other=-1)
        visible = inside[None, :] & ((first + column)[None, :] <= own[:, None])
        logits = tl.where(visible, logits, LEAST)
        top = tl.max(logits, 1)
        p = tl.where(visible, tl.exp2(logits - top[:, None]), 0.0)
        total = tl.sum(p, 1)
        values = _tile(v, first + column, kv_head, inside, HEADS // GROUP, D_V, PAD_V)
        out = _dot(p.to(values.dtype), values, WIDEN) / tl.maximum(total, 1e-30)[:, None]
        tl.store(part_max + at, top, mask=there)
        tl.store(part_sum + at, total, mask=there)
        wide = tl.arange(0, PAD_V)
        tl.store(
            part + at[:, None] * D_V + wide[None, :],
            out.to(part.dtype.element_ty),
            mask=there[:, None] & (wide < D_V)[None, :],
        )


@triton.jit
def merge(
    part,
    part_max,
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
    """Joins the parts of one query's group, in the order of its blocks."""
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
        its_top = tl.load(part_max + at, mask=known, other=LEAST)
        its_sum = tl.load(part_sum + at, mask=known, other=0.0)
        its_out = tl.load(
            part + at[:, None] * D_V + column[None, :], mask=both & known[:, None], other=0.0
        ).to(tl.float32)
        new = tl.maximum(top, its_top)
        kept = tl.exp2(top - new)
        weight = its_sum * tl.exp2(its_top - new)
        acc = acc * kept[:, None] + its_out * weight[:, None]
        total = total * kept + weight
        top = new
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    head = kv_head * GROUP + member
    tl.store(
        out + (token * HEADS + head)[:, None] * D_V + column[None, :],
        result.to(out.dtype.element_ty),
        mask=both,
    )
    logarithm = tl.where(
        total > 0, (top + tl.log2(tl.where(total > 0, total, 1.0))) / LOG2_E, float("-inf")
    )
    tl.store(lse + token * HEADS + head, logarithm, mask=there)


@triton.jit
def backward(
    q,
    k,
    v,
    gradient,
    lse,
    delta,
    dq_part,
    dk,
    dv,
    rows,
    query,
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
    """All queries of one block: its dK and dV, in float32 over the group, and parts of dQ."""
    row = tl.program_id(0).to(tl.int64)
    kv_head = row // blocks
    block = row % blocks
    first = tl.load(block_first + block)
    column = tl.arange(0, BLOCK)
    inside = column < tl.load(block_length + block)
    narrow = tl.arange(0, PAD)
    wide = tl.arange(0, PAD_V)
    key_at = ((first + column) * (HEADS // GROUP) + kv_head)[:, None]
    k_at = key_at * D + narrow[None, :]
    v_at = key_at * D_V + wide[None, :]
    k_mask = inside[:, None] & (narrow < D)[None, :]
    v_mask = inside[:, None] & (wide < D_V)[None, :]
    keys = tl.load(k + k_at, mask=k_mask, other=0.0)
    values = tl.load(v + v_at, mask=v_mask, other=0.0)
    sum_k = tl.load(dk + k_at, mask=k_mask, other=0.0)
    sum_v = tl.load(dv + v_at, mask=v_mask, other=0.0)
    length = (tl.load(rows + row + 1) - tl.load(rows + row)) * GROUP
    for offset in range(0, length, ROWS):
        at, there, token, head = _rows(row, offset, rows, query, kv_head, GROUP, ROWS)
        queries = _tile(q, token, head, there, HEADS, D, PAD)
        above = _tile(gradient, token, head, there, HEADS, D_V, PAD_V)
        stat = token * HEADS + head
        shift = tl.load(lse + stat, mask=there, other=0.0) * LOG2_E
        its_delta = tl.load(delta + stat, mask=there, other=0.0)
        own = tl.load(last + token, mask=there, other=-1)
        visible = inside[None, :] & ((first + column)[None, :] <= own[:, None]) & there[:, None]
        logits = _dot(queries, tl.trans(keys), WIDEN) * (scale * LOG2_E)
        p = tl.exp2(tl.where(visible, logits - shift[:, None], LEAST))
        dp = _dot(above, tl.trans(values), WIDEN)
        ds = tl.where(visible, p * (dp - its_delta[:, None]) * scale, 0.0)
        sum_v += _dot(tl.trans(p).to(above.dtype), above, WIDEN)
        ds = ds.to(queries.dtype)
        sum_k += _dot(tl.trans(ds), queries, WIDEN)
        tl.store(
            dq_part + at[:, None] * D + narrow[None, :],
            _dot(ds, keys, WIDEN),
            mask=there[:, None] & (narrow < D)[None, :],
        )
    tl.store(dk + k_at, sum_k, mask=k_mask)
    tl.store(dv + v_at, sum_v, mask=v_mask)


@triton.jit
def sum_parts(
    part,
    place,
    out,
    queries,
    TOP: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    D: tl.constexpr,
    PAD: tl.constexpr,
):
    """Adds up one query's parts of dQ, in the order of its blocks."""
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    member = tl.arange(0, GROUP_PAD)
    column = tl.arange(0, PAD)
    both = (member < GROUP)[:, None] & (column < D)[None, :]
    acc = tl.zeros((GROUP_PAD, PAD), tl.float32)
    for slot in range(TOP):
        entry = tl.load(place + (kv_head * queries + token) * TOP + slot).to(tl.int64)
        at = entry * GROUP + member
        known = both & (at >= 0)[:, None]
        acc += tl.load(part + at[:, None] * D + column[None, :], mask=known, other=0.0)
    head = (kv_head * GROUP + member)[:, None]
    tl.store(
        out + (token * HEADS + head) * D + column[None, :],
        acc.to(out.dtype.element_ty),
        mask=both,
    )
