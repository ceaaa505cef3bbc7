"""Attention to spans of neighbouring keys on a GPU: compressed entries, and sliding windows.

Neither end of the spans of packed queries ever falls; so a tile of queries sees one range of keys,
and a tile of keys is seen by one range of queries. Kernels know nothing of sequences.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False, check-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from trimtab.kernels.sparse.triton_selected import (
    AS_THEY_ARE,
    FINITE,
    LEAST,
    ODD,
    _dot,
    _due,
    _finite,
    _has_to,
    _meet,
    _note,
    _put,
    _slopes,
    _tile,
    _to_natural,
    _write,
)

SIZES = ("queries", "tokens")
"""Numbers that differ from call to call: one kernel serves all."""


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


@triton.jit(do_not_specialize=SIZES)
def forward(
    q,
    k,
    v,
    out,
    lse,
    low,
    high,
    odd,
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
    AGAIN: tl.constexpr,
):
    """Output and logarithm of one tile of queries and head."""
    flags = odd + tl.program_id(0).to(tl.int64) * HEADS
    if not _has_to(flags, HEADS, AGAIN):
        return
    for nth in range(HEADS if AGAIN else 1):
        head = tl.program_id(1).to(tl.int64) + nth
        tile, due = _due(flags + head, AGAIN)
        if due:
            begin = tile * ROWS
            token, there, first, end = _queries(low, high, begin, queries, ROWS)
            base = tl.load(low + begin)
            first, end = (first - base).to(tl.int32), (end - base).to(tl.int32)
            stop = tl.max(end, 0)
            query = _tile(q, token, head, there, HEADS, D, PAD)
            for attempt in tl.static_range(
                FINITE if AGAIN else AS_THEY_ARE, ODD + 1 if AGAIN else FINITE
            ):
                if attempt != ODD:
                    top = tl.full((ROWS,), LEAST, tl.float32)
                    total = tl.zeros((ROWS,), tl.float32)
                acc = tl.zeros((ROWS, PAD_V), tl.float32)
                for at in range(0, stop, KEYS):
                    key = at + tl.arange(0, KEYS)
                    known = key < stop
                    keys = _tile(k, base + key, head // GROUP, known, HEADS // GROUP, D, PAD)
                    values = _tile(v, base + key, head // GROUP, known, HEADS // GROUP, D_V, PAD_V)
                    visible = (key[None, :] >= first[:, None]) & (key[None, :] < end[:, None])
                    acc, total, top = _meet(
                        acc, total, top, query, keys, values, visible, scale, attempt, WIDEN
                    )
                _write(out, token, head, there, acc, total, HEADS, D_V, PAD_V, attempt)
                if attempt == AS_THEY_ARE:
                    tl.store(lse + token * HEADS + head, _to_natural(top, total), mask=there)
                    _note(flags + head, acc)


@triton.jit(do_not_specialize=SIZES)
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
    odd,
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
    AGAIN: tl.constexpr,
):
    """dQ of one tile of queries and head."""
    flags = odd + tl.program_id(0).to(tl.int64) * HEADS
    if not _has_to(flags, HEADS, AGAIN):
        return
    for nth in range(HEADS if AGAIN else 1):
        head = tl.program_id(1).to(tl.int64) + nth
        tile, due = _due(flags + head, AGAIN)
        if due:
            begin = tile * ROWS
            token, there, first, end = _queries(low, high, begin, queries, ROWS)
            stop = tl.max(end, 0)
            query = _tile(q, token, head, there, HEADS, D, PAD)
            above = _tile(gradient, token, head, there, HEADS, D_V, PAD_V)
            stat = token * HEADS + head
            acc = tl.zeros((ROWS, PAD), tl.float32)
            for at in range(tl.load(low + begin), stop, KEYS):
                key = at + tl.arange(0, KEYS)
                known = key < stop
                keys = _tile(k, key, head // GROUP, known, HEADS // GROUP, D, PAD)
                values = _tile(v, key, head // GROUP, known, HEADS // GROUP, D_V, PAD_V)
                visible = (key[None, :] >= first[:, None]) & (key[None, :] < end[:, None])
                _, ds = _slopes(
                    query, keys, values, above, stat, lse, delta, there, visible, scale, WIDEN
                )
                if AGAIN:
                    keys = _finite(keys)
                acc += _dot(ds.to(keys.dtype), keys, WIDEN)
            _put(dq, token, head, there, acc, HEADS, D, PAD)
            if not AGAIN:
                _note(flags + head, acc)


@triton.jit(do_not_specialize=SIZES)
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
            visible = (key[None, :] >= first[:, None]) & (key[None, :] < end[:, None])
            stat = token * HEADS + head
            p, ds = _slopes(
                query, keys, values, above, stat, lse, delta, there, visible, scale, WIDEN
            )
            sum_v += _dot(tl.trans(p).to(above.dtype), above, WIDEN)
            sum_k += _dot(tl.trans(ds).to(query.dtype), query, WIDEN)
    _put(dk, key, kv_head, known, sum_k, HEADS // GROUP, D, PAD)
    _put(dv, key, kv_head, known, sum_v, HEADS // GROUP, D_V, PAD_V)
