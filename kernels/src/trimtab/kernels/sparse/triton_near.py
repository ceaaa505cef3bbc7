"""Selected attention on a GPU: blocks that neighbouring queries share, and the sum of all others.

A tile of queries reads the blocks that any of them calls near, each once, as dense attention would.
The parts of all other blocks, which `triton_selected.forward` has written, are joined to that.
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
    _due,
    _has_to,
    _meet,
    _note,
    _tile,
    _to_natural,
    _write,
)

ANYWHERE = ("ids", "last", "rows", "place", "lse")
"""Where segments begin in these is aligned or not; nothing is gained by a kernel for each case."""

SIZES = ("begin", "count", "heads", "tiles_before", "until", "queries", "keys", "lines")
"""Numbers that differ from call to call and from segment to segment; likewise."""


@triton.jit
def _is_near(block, position, until, BLOCK: tl.constexpr):
    """Whether queries call a block near: their own, that before and the first; early ones any.

    Neither a tile's other queries nor where a call begins may matter, so that a query gets the same
    bits in every call.
    """
    own = position // BLOCK
    return (block >= 0) & ((block == 0) | (block >= own - 1) | (position < until))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ANYWHERE)
def far(
    ids,
    out,
    last,
    sequence,
    before,
    block_first,
    queries,
    keys,
    until,
    TOP: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Copies ``ids [kv_heads, queries, TOP]``, but for -1 where a block is near.

    So has what no key of a sequence belongs to, as rows behind all sequences: no more queries keep
    any than there are late keys, and for so many there is room.
    """
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = token < queries
    its_sequence = tl.load(sequence + token, mask=there, other=0)
    its_first = tl.load(before + its_sequence, mask=there, other=0)
    first_key = tl.load(block_first + its_first, mask=there, other=0)
    own_key = tl.load(last + token, mask=there, other=0)
    position = own_key - first_key
    slot = tl.arange(0, KEPT)
    place = (tl.program_id(1).to(tl.int64) * queries + token)[:, None] * TOP + slot[None, :]
    known = there[:, None] & (slot < TOP)[None, :]
    number = tl.load(ids + place, mask=known, other=-1)
    near = _is_near(number - its_first[:, None], position[:, None], until, BLOCK)
    tl.store(out + place, tl.where(near | (own_key >= keys)[:, None], -1, number), mask=known)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _count(word):
    """The set bits of 64."""
    bits = (word >> tl.arange(0, 64).to(tl.int64)) & 1
    return tl.sum(bits.to(tl.int32), 0)


@triton.jit
def _log2(power):
    """Of a power of two below ``2 ** 63``."""
    return (power.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def _near_blocks(
    ids,
    place,
    there,
    first_block,
    position,
    earliest,
    until,
    TOP: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What a tile's queries call near, as bits of a word each: bit 0 is the first block.

    The others stand for blocks from ``skipped`` on, which is returned too.
    """
    skipped = tl.where(earliest < until, 0, tl.maximum(earliest // BLOCK - 2, 0))
    mine = tl.zeros((ROWS,), tl.int64)
    for at in range(0, TOP, AT_ONCE):
        slot = at + tl.arange(0, AT_ONCE)
        known = there[:, None] & (slot < TOP)[None, :]
        number = tl.load(ids + place[:, None] + slot[None, :], mask=known, other=-1)
        block = tl.where(number >= 0, number - first_block, -1)
        is_near = _is_near(block, position[:, None], until, BLOCK)
        block = tl.where(is_near, block, -1).to(tl.int32)
        bit = tl.where(block > 0, block - skipped, block)
        one = tl.full(block.shape, 1, tl.int64)
        words = tl.where(bit >= 0, one << tl.maximum(bit, 0).to(tl.int64), 0)
        mine |= tl.reduce(words, 1, _or)
    return mine, skipped


@triton.jit
def _join(acc, total, top, part, part_max, part_sum, where, D_V: tl.constexpr, PAD_V: tl.constexpr):
    """Adds one part of each row's softmax, those ``where`` there is any."""
    known = where >= 0
    column = tl.arange(0, PAD_V)
    its_top = tl.load(part_max + where, mask=known, other=LEAST)
    its_sum = tl.load(part_sum + where, mask=known, other=0.0)
    its_out = tl.load(
        part + where[:, None] * D_V + column[None, :],
        mask=known[:, None] & (column < D_V)[None, :],
        other=0.0,
    ).to(tl.float32)
    new = tl.maximum(top, its_top)
    kept = tl.exp2(top - new)
    weight = its_sum * tl.exp2(its_top - new)
    return acc * kept[:, None] + its_out * weight[:, None], total * kept + weight, new


@triton.jit
def _join_parts(
    part,
    part_max,
    part_sum,
    place,
    there,
    base,
    head,
    slots,
    GROUP: tl.constexpr,
    D_V: tl.constexpr,
    PAD_V: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The softmax of a head's parts, as many of a query as it has ``slots`` from ``place`` on."""
    top = tl.full((ROWS,), LEAST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, PAD_V), tl.float32)
    for slot in range(slots):
        entry = tl.load(place + slot, mask=there, other=-1).to(tl.int64)
        where = tl.where(entry >= 0, (entry - base) * GROUP + head % GROUP, -1)
        acc, total, top = _join(acc, total, top, part, part_max, part_sum, where, D_V, PAD_V)
    return acc, total, top


@triton.jit
def _meet_near(
    acc,
    total,
    top,
    query,
    k,
    v,
    first_key,
    kv_head,
    mine,
    skipped,
    position,
    latest,
    scale,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    PAD: tl.constexpr,
    PAD_V: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    ATTEMPT: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Adds the keys of all blocks whose bits a query of the tile has in ``mine``."""
    pieces: tl.constexpr = BLOCK // KEYS
    left = tl.reduce(mine, 0, _or)
    for at in range(_count(left) * pieces):
        lowest = left & -left
        its_bit = _log2(lowest)
        its_block = tl.where(its_bit > 0, its_bit + skipped, 0)
        key = its_block * BLOCK + at % pieces * KEYS + tl.arange(0, KEYS)
        inside = key <= latest
        keys = _tile(k, first_key + key, kv_head, inside, KV_HEADS, D, PAD)
        values = _tile(v, first_key + key, kv_head, inside, KV_HEADS, D_V, PAD_V)
        reached = tl.where((mine & lowest) != 0, position, -1)
        visible = key[None, :] <= reached[:, None]
        acc, total, top = _meet(
            acc, total, top, query, keys, values, visible, scale, ATTEMPT, WIDEN
        )
        left = tl.where(at % pieces == pieces - 1, left ^ lowest, left)
    return acc, total, top


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ANYWHERE)
def near_and_join(
    q,
    k,
    v,
    ids,
    part,
    part_max,
    part_sum,
    rows,
    place,
    out,
    lse,
    tile_first,
    tile_length,
    tile_sequence,
    before,
    block_first,
    last,
    odd,
    scale,
    begin,
    count,
    heads,
    tiles_before,
    until,
    queries,
    lines,
    TOP: tl.constexpr,
    AT_ONCE: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    PAD: tl.constexpr,
    PAD_V: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDEN: tl.constexpr,
    AGAIN: tl.constexpr,
):
    """Output and logarithm of a tile of queries and head, in a segment of ``count`` from ``begin``.

    ``ids [kv_heads, queries, TOP]`` are all that was chosen, ``place [kv_heads, lines, TOP]`` where
    the parts of what is far lie. No block but the first 63 may be chosen by queries that come
    before ``until`` or share a tile with one.
    """
    flags = odd + tl.program_id(0).to(tl.int64) * heads
    if not _has_to(flags, heads, AGAIN):
        return
    for nth in range(heads if AGAIN else 1):
        head = tl.program_id(1).to(tl.int64) + nth
        number, due = _due(flags + head, AGAIN)
        tile = tiles_before + number
        row = tl.arange(0, ROWS)
        token = tl.load(tile_first + tile) - begin + row
        there = (row < tl.load(tile_length + tile)) & (token >= 0) & (token < count)
        if not AGAIN:
            due = tl.max(there.to(tl.int32), 0) > 0
        if due:
            first_block = tl.load(before + tl.load(tile_sequence + tile))
            own_key = tl.load(last + token, mask=there, other=-1)
            first_key = tl.load(block_first + first_block)
            position = (own_key - first_key).to(tl.int32)
            earliest = tl.min(tl.where(there, position, 2147483647), 0)
            latest = tl.max(tl.where(there, position, -1), 0)
            base = tl.load(rows)
            kv_head = head // GROUP
            mine, skipped = _near_blocks(
                ids,
                (kv_head * queries + token) * TOP,
                there,
                first_block,
                position,
                earliest,
                until,
                TOP,
                AT_ONCE,
                BLOCK,
                ROWS,
            )
            for attempt in tl.static_range(
                FINITE if AGAIN else AS_THEY_ARE, ODD + 1 if AGAIN else FINITE
            ):
                if attempt == ODD:
                    acc = tl.zeros((ROWS, PAD_V), tl.float32)
                else:
                    acc, total, top = _join_parts(
                        part,
                        part_max,
                        part_sum,
                        place + (kv_head * lines + token) * TOP,
                        there,
                        base,
                        head,
                        tl.where(latest >= until, TOP, 0),
                        GROUP,
                        D_V,
                        PAD_V,
                        ROWS,
                    )
                query = _tile(q, token, head, there, HEADS, D, PAD)
                acc, total, top = _meet_near(
                    acc,
                    total,
                    top,
                    query,
                    k,
                    v,
                    first_key,
                    kv_head,
                    mine,
                    skipped,
                    position,
                    latest,
                    scale,
                    HEADS // GROUP,
                    D,
                    D_V,
                    PAD,
                    PAD_V,
                    BLOCK,
                    KEYS,
                    attempt,
                    WIDEN,
                )
                _write(out, token, head, there, acc, total, HEADS, D_V, PAD_V, attempt, True)
                if attempt == AS_THEY_ARE:
                    natural = _to_natural(top, total)
                    tl.store(lse + token * HEADS + head, natural, mask=there)
                    _note(flags + head, acc)
        elif not AGAIN:
            tl.store(flags + head, 0)
