"""Prefill of a dense model on a GPU: tiles of queries, and the blocks of keys that they share.

Keys and values are read where they lie in the pages of a server's cache. One request at a time.
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
    LOG2_E,
    ODD,
    _dot,
    _due,
    _has_to,
    _meet,
    _note,
    _tile,
    _write,
)

ANYWHERE = ("pages",)
"""A request's row of a server's table is aligned or not: one kernel serves both."""
SIZES = ("position", "queries", "samples", "tiles", "blocks")
"""Numbers that differ from prompt to prompt; likewise."""


@triton.jit
def _places(pages, key, inside, kv_head, page_stride, head_stride, slot_stride, PAGE: tl.constexpr):
    """Where tokens of a request lie in a cache."""
    page = tl.load(pages + key // PAGE, mask=inside, other=0).to(tl.int64)
    return page * page_stride + kv_head * head_stride + (key % PAGE) * slot_stride


@triton.jit
def _read(pointer, place, inside, D: tl.constexpr, PAD: tl.constexpr):
    """Rows of a cache ``[tokens, PAD]``; what is not inside counts as 0, whatever lies there."""
    column = tl.arange(0, PAD)
    both = inside[:, None] & (column < D)[None, :]
    return tl.load(pointer + place[:, None] + column[None, :], mask=both, other=0.0)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ANYWHERE)
def block_logarithms(
    q,
    k,
    out,
    pages,
    position,
    queries,
    samples,
    blocks,
    scale,
    page_stride,
    head_stride,
    slot_stride,
    STEP: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PER_PROGRAM: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Logarithms, to base 2, of what each block weighs for the last query of each ``STEP``.

    ``out [heads, samples, blocks]`` is left as it is where nothing is visible.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < samples
    token = tl.minimum(row * STEP + STEP - 1 - position % STEP, queries - 1)
    own = position + token
    head = tl.program_id(1).to(tl.int64)
    query = _tile(q, token.to(tl.int64), head, there, HEADS, D, PAD)
    first = tl.program_id(2) * PER_PROGRAM
    end = tl.minimum(first + PER_PROGRAM, tl.max(own, 0) // BLOCK + 1)
    for number in range(first, end):
        key = number * BLOCK + tl.arange(0, BLOCK)
        inside = key < position + queries
        place = _places(
            pages, key, inside, head // GROUP, page_stride, head_stride, slot_stride, PAGE
        )
        keys = _read(k, place, inside, D, PAD)
        visible = inside[None, :] & (key[None, :] <= own[:, None])
        logits = _dot(query, tl.trans(keys), WIDEN) * (scale * LOG2_E)
        logits = tl.where(visible, logits, LEAST)
        top = tl.max(logits, 1)
        total = tl.sum(tl.where(visible, tl.exp2(logits - top[:, None]), 0.0), 1)
        logarithm = top + tl.log2(tl.where(total > 0, total, 1.0))
        tl.store(out + (head * samples + row) * blocks + number, logarithm, mask=there)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ANYWHERE)
def attend(
    q,
    k,
    v,
    out,
    pages,
    lists,
    counts,
    bits,
    odd,
    position,
    queries,
    tiles,
    blocks,
    scale,
    page_stride,
    head_stride,
    slot_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDEN: tl.constexpr,
    BY_QUERY: tl.constexpr,
    AGAIN: tl.constexpr,
):
    """Attention of ``ROWS`` queries and a head to the blocks of their tile, ``lists``.

    ``lists [heads, tiles, blocks]``, of which the first ``counts [heads, tiles]`` are looked at;
    tiles are as long as blocks, and the first query is the first of its own. Where queries choose,
    ``bits [heads, tiles, blocks]`` says which of a tile chose a block.
    """
    flags = odd + tl.program_id(0).to(tl.int64) * HEADS
    if not _has_to(flags, HEADS, AGAIN):
        return
    for nth in range(HEADS if AGAIN else 1):
        head = tl.program_id(1).to(tl.int64) + nth
        from_last, due = _due(flags + head, AGAIN)
        if due:
            # The last tiles have most to do, and begin first.
            begin = (tl.num_programs(0) - 1 - from_last.to(tl.int32)) * ROWS
            token = begin + tl.arange(0, ROWS)
            there = token < queries
            own = position + token
            query = _tile(q, token.to(tl.int64), head, there, HEADS, D, PAD)
            row = head * tiles + begin // BLOCK
            for attempt in tl.static_range(
                FINITE if AGAIN else AS_THEY_ARE, ODD + 1 if AGAIN else FINITE
            ):
                if attempt != ODD:
                    top = tl.full((ROWS,), LEAST, tl.float32)
                    total = tl.zeros((ROWS,), tl.float32)
                acc = tl.zeros((ROWS, PAD), tl.float32)
                for part in range(tl.load(counts + row) * (BLOCK // KEYS)):
                    block = tl.load(lists + row * blocks + part // (BLOCK // KEYS))
                    key = block * BLOCK + part % (BLOCK // KEYS) * KEYS + tl.arange(0, KEYS)
                    inside = key < position + queries
                    place = _places(
                        pages,
                        key,
                        inside,
                        head // GROUP,
                        page_stride,
                        head_stride,
                        slot_stride,
                        PAGE,
                    )
                    keys = _read(k, place, inside, D, PAD)
                    values = _read(v, place, inside, D, PAD)
                    visible = inside[None, :] & (key[None, :] <= own[:, None])
                    if BY_QUERY:
                        chose = tl.load(bits + row * blocks + block) >> (own % BLOCK) & 1
                        visible = visible & (chose[:, None] != 0)
                    acc, total, top = _meet(
                        acc, total, top, query, keys, values, visible, scale, attempt, WIDEN
                    )
                _write(out, token.to(tl.int64), head, there, acc, total, HEADS, D, PAD, attempt)
                if attempt == AS_THEY_ARE:
                    _note(flags + head, acc)
