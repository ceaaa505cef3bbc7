"""Streaming selection on a GPU: no score is written, a query keeps its best blocks in registers.

Queries are taken in tiles of one sequence; entries are the compressed keys of all sequences.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trimtab.kernels.sparse.triton_selected import LEAST, LOG2_E, _dot, _tile, _to_natural

NO_BLOCK = tl.constexpr(0x7FFFFFFF)
INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def _queries(tile, tile_first, tile_length, low, high, QUERIES: tl.constexpr):
    """A tile's queries, whether each is there, their first entry, and how many each sees."""
    row = tl.arange(0, QUERIES)
    length = tl.load(tile_length + tile)
    there = row < length
    first = tl.load(tile_first + tile)
    token = first + row
    begin = tl.load(low + first, mask=length > 0, other=0)
    return token, there, begin, tl.load(high + token, mask=there, other=0) - begin


@triton.jit
def entry_logarithms(
    q,
    entries,
    lse,
    tile_first,
    tile_length,
    low,
    high,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAD: tl.constexpr,
    QUERIES: tl.constexpr,
    ENTRIES: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Logarithms of each query's sum over the entries it sees; one tile and head."""
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    token, there, begin, seen = _queries(tile, tile_first, tile_length, low, high, QUERIES)
    queries = _tile(q, token, head, there, HEADS, D, PAD)
    top = tl.full((QUERIES,), LEAST, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    for at in range(0, tl.max(seen, 0), ENTRIES):
        number = at + tl.arange(0, ENTRIES)
        known = number < tl.max(seen, 0)
        keys = _tile(entries, begin + number, head // GROUP, known, HEADS // GROUP, D, PAD)
        logits = _dot(queries, tl.trans(keys), WIDEN) * (scale * LOG2_E)
        shown = number[None, :] < seen[:, None]
        logits = tl.where(shown, logits, LEAST)
        new = tl.maximum(top, tl.max(logits, 1))
        p = tl.where(shown, tl.exp2(logits - new[:, None]), 0.0)
        total = total * tl.exp2(top - new) + tl.sum(p, 1)
        top = new
    tl.store(lse + token * HEADS + head, _to_natural(top, total), mask=there)


@triton.jit
def best_blocks(
    q,
    entries,
    lse,
    out,
    tile_first,
    tile_length,
    low,
    high,
    own,
    tokens,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAD: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    REACH: tl.constexpr,
    OUTER: tl.constexpr,
    FIRST: tl.constexpr,
    RECENT: tl.constexpr,
    TOP: tl.constexpr,
    KEPT: tl.constexpr,
    QUERIES: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The best blocks of a tile's queries, ascending; among equal scores the lower block wins.

    A candidate's key is its score's bits above its inverted id, so that one sort settles both.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    token, there, begin, seen = _queries(tile, tile_first, tile_length, low, high, QUERIES)
    its_own = tl.load(own + token, mask=there, other=-1)
    best = tl.full((QUERIES, KEPT), -1, tl.int64)
    for at in range(0, tl.max(its_own, 0) + 1, KEPT):
        block = at + tl.arange(0, KEPT)
        score = tl.zeros((QUERIES, KEPT), tl.float32)
        for member in range(GROUP):
            head = kv_head * GROUP + member
            queries = _tile(q, token, head, there, HEADS, D, PAD)
            shift = tl.load(lse + token * HEADS + head, mask=there, other=0.0) * LOG2_E
            shift = tl.where(shift > float("-inf"), shift, 0.0)
            for tap in range(PER_BLOCK + OUTER - 1):
                number = block * PER_BLOCK - REACH + tap
                known = (number >= 0) & (number < tl.max(seen, 0))
                keys = _tile(entries, begin + number, kv_head, known, HEADS // GROUP, D, PAD)
                logits = _dot(queries, tl.trans(keys), WIDEN) * (scale * LOG2_E)
                shown = known[None, :] & (number[None, :] < seen[:, None])
                p = tl.exp2(tl.where(shown, logits - shift[:, None], LEAST))
                weight = min(min(tap + 1, PER_BLOCK + OUTER - 1 - tap), min(PER_BLOCK, OUTER))
                score += p * weight
        bits = score.to(tl.int32, bitcast=True)
        forced = (block < FIRST)[None, :] | (block[None, :] > (its_own - RECENT)[:, None])
        bits = tl.where(forced, INFINITY_BITS, bits)
        keyed = (bits.to(tl.int64) << 32) | (block ^ NO_BLOCK)[None, :].to(tl.int64)
        keyed = tl.where(block[None, :] <= its_own[:, None], keyed, -1)
        both = tl.reshape(tl.join(best, keyed), (QUERIES, 2 * KEPT))
        best = tl.topk(both, KEPT)
    rank = tl.arange(0, KEPT)
    ids = (best & 0x7FFFFFFF).to(tl.int32) ^ NO_BLOCK
    ids = tl.where((best < 0) | (rank >= TOP)[None, :], NO_BLOCK, ids)
    ids = tl.sort(ids)
    ids = tl.where(ids == NO_BLOCK, -1, ids)
    address = (kv_head * tokens + token)[:, None] * TOP + rank[None, :]
    tl.store(out + address, ids, mask=there[:, None] & (rank < TOP)[None, :])
