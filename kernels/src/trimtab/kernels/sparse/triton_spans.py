"""Attention to spans of neighbouring keys on a GPU: compressed entries, and sliding windows.

Neither end of the spans of packed queries ever falls; so a tile of queries sees one range of keys,
and a tile of keys is seen by one range of queries. Kernels know nothing of sequences.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False, check-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from trimtab.kernels.sparse.triton_selected import LEAST, LOG2_E, _dot, _tile


@triton.jit
def _queries(low, high, begin, queries, ROWS: tl.constexpr):
    """A tile's queries, whether each is there, and its span."""
    token = begin + tl.arange(0, ROWS)
    there = token < queries
    return (
        token,
        there,
        tl.load(low + token, mask=there, other=0),
        tl.load(high + token, mask=there, other=0),
    )


@triton.jit
def forward(
    q,
    k,
    v,
    out,
    lse,
    low,
    high,
    queries,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    PAD: tl.constexpr,
    PAD_V: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Output and logarithm of one tile of queries and head."""
    head = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(0).to(tl.int64) * ROWS
    token, there, first, end = _queries(low, high, begin, queries, ROWS)
    query = _tile(q, token, head, there, HEADS, D, PAD)
    top = tl.full((ROWS,), LEAST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, PAD_V), tl.float32)
    stop = tl.max(end, 0)
    for at in range(tl.load(low + begin), stop, KEYS):
        key = at + tl.arange(0, KEYS)
        known = key < stop
        keys = _tile(k, key, head // GROUP, known, HEADS // GROUP, D, PAD)
        values = _tile(v, key, head // GROUP, known, HEADS // GROUP, D_V, PAD_V)
        visible = (key[None, :] >= first[:, None]) & (key[None, :] < end[:, None])
        logits = tl.where(visible, _dot(query, tl.trans(keys), WIDEN) * (scale * LOG2_E), LEAST)
        new = tl.maximum(top, tl.max(logits, 1))
        p = tl.where(visible, tl.exp2(logits - new[:, None]), 0.0)
        kept = tl.exp2(top - new)
        acc = acc * kept[:, None] + _dot(p.to(values.dtype), values, WIDEN)
        total = total * kept + tl.sum(p, 1)
        top = new
    seen = total > 0
    safe = tl.where(seen, total, 1.0)
    column = tl.arange(0, PAD_V)
    tl.store(
        out + (token * HEADS + head)[:, None] * D_V + column[None, :],
        (acc / safe[:, None]).to(out.dtype.element_ty),
        mask=there[:, None] & (column < D_V)[None, :],
    )
    logarithm = tl.where(seen, (top + tl.log2(safe)) / LOG2_E, float("-inf"))
    tl.store(lse + token * HEADS + head, logarithm, mask=there)


@triton.jit
def backward_queries(
    q,
    k,
    v,
    gradient,
    lse,
    delta,
    dq,
    low,
    high,
    queries,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    PAD: tl.constexpr,
    PAD_V: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """dQ of one tile of queries and head."""
    head = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(0).to(tl.int64) * ROWS
    token, there, first, end = _queries(low, high, begin, queries, ROWS)
    query = _tile(q, token, head, there, HEADS, D, PAD)
    above = _tile(gradient, token, head, there, HEADS, D_V, PAD_V)
    shift = tl.load(lse + token * HEADS + head, mask=there, other=0.0) * LOG2_E
    its_delta = tl.load(delta + token * HEADS + head, mask=there, other=0.0)
    acc = tl.zeros((ROWS, PAD), tl.float32)
    stop = tl.max(end, 0)
    for at in range(tl.load(low + begin), stop, KEYS):
        key = at + tl.arange(0, KEYS)
        known = key < stop
        keys = _tile(k, key, head // GROUP, known, HEADS // GROUP, D, PAD)
        values = _tile(v, key, head // GROUP, known, HEADS // GROUP, D_V, PAD_V)
        visible = (key[None, :] >= first[:, None]) & (key[None, :] < end[:, None])
        logits = _dot(query, tl.trans(keys), WIDEN) * (scale * LOG2_E)
        p = tl.exp2(tl.where(visible, logits - shift[:, None], LEAST))
        dp = _dot(above, tl.trans(values), WIDEN)
        ds = tl.where(visible, p * (dp - its_delta[:, None]) * scale, 0.0)
        acc += _dot(ds.to(keys.dtype), keys, WIDEN)
    column = tl.arange(0, PAD)
    tl.store(
        dq + (token * HEADS + head)[:, None] * D + column[None, :],
        acc.to(dq.dtype.element_ty),
        mask=there[:, None] & (column < D)[None, :],
    )


@triton.jit
def backward_keys(
    q,
    k,
    v,
    gradient,
    lse,
    delta,
    dk,
    dv,
    low,
    high,
    first_query,
    end_query,
    queries,
    tokens,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    PAD: tl.constexpr,
    PAD_V: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """dK and dV of one tile of keys and KV head, summed over its heads in their order."""
    kv_head = tl.program_id(1).to(tl.int64)
    key = tl.program_id(0).to(tl.int64) * KEYS + tl.arange(0, KEYS)
    known = key < tokens
    keys = _tile(k, key, kv_head, known, HEADS // GROUP, D, PAD)
    values = _tile(v, key, kv_head, known, HEADS // GROUP, D_V, PAD_V)
    sum_k = tl.zeros((KEYS, PAD), tl.float32)
    sum_v = tl.zeros((KEYS, PAD_V), tl.float32)
    begin = tl.load(first_query + tl.program_id(0))
    stop = tl.load(end_query + tl.program_id(0))
    for member in range(GROUP):
        head = kv_head * GROUP + member
        for at in range(begin, stop, ROWS):
            token, there, first, end = _queries(low, high, at, queries, ROWS)
            query = _tile(q, token, head, there, HEADS, D, PAD)
            above = _tile(gradient, token, head, there, HEADS, D_V, PAD_V)
            shift = tl.load(lse + token * HEADS + head, mask=there, other=0.0) * LOG2_E
            its_delta = tl.load(delta + token * HEADS + head, mask=there, other=0.0)
            visible = (key[None, :] >= first[:, None]) & (key[None, :] < end[:, None])
            logits = _dot(query, tl.trans(keys), WIDEN) * (scale * LOG2_E)
            p = tl.exp2(tl.where(visible, logits - shift[:, None], LEAST))
            dp = _dot(above, tl.trans(values), WIDEN)
            ds = tl.where(visible, p * (dp - its_delta[:, None]) * scale, 0.0)
            sum_v += _dot(tl.trans(p).to(above.dtype), above, WIDEN)
            sum_k += _dot(tl.trans(ds).to(query.dtype), query, WIDEN)
    where = (key * (HEADS // GROUP) + kv_head)[:, None]
    narrow, wide = tl.arange(0, PAD), tl.arange(0, PAD_V)
    tl.store(
        dk + where * D + narrow[None, :],
        sum_k.to(dk.dtype.element_ty),
        mask=known[:, None] & (narrow < D)[None, :],
    )
    tl.store(
        dv + where * D_V + wide[None, :],
        sum_v.to(dv.dtype.element_ty),
        mask=known[:, None] & (wide < D_V)[None, :],
    )
