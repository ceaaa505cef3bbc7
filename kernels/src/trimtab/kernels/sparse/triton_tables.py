"""Index tables on a GPU: what lies where, ids numbered, lists of blocks inverted, items of work.

The inversion is a counting sort with the order of a stable one, and without atomics: a program goes
through the queries of its tile one after the other, and none of them names a block twice, so that
no number is added to twice at once. What is counted takes little beside the lists, since tiles are
large. Nothing depends on the order in which programs run.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False, check-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

NONE = tl.constexpr(0x7FFFFFFF)

SIZES = (
    *("head_stride", "known", "queries", "pieces", "lines", "tiles", "blocks"),
    *("most", "sequences", "block", "window", "stride"),
)
"""Numbers for which no kernels of their own are compiled."""

ANYWHERE = ("ids", "item_row", "item_chunk")
"""Parts of tensors, which are aligned or not; nothing is gained by a kernel for each case."""


@triton.jit
def _laid(cu_queries, cu_keys, queries, sequences, ROWS: tl.constexpr, ENDS: tl.constexpr):
    """Some queries, whether each is there, its sequence, its own key, and its sequence's first.

    A query's sequence has the number of those that end before the query.
    """
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    number = tl.zeros((ROWS,), tl.int64)
    for first in range(0, sequences - 1, ENDS):
        at = first + tl.arange(0, ENDS)
        ends = tl.load(cu_queries + 1 + at, mask=at < sequences - 1, other=NONE)
        behind = (ends[None, :] <= token[:, None]) & (at < sequences - 1)[None, :]
        number += tl.sum(behind.to(tl.int32), 1)
    end = tl.load(cu_queries + number + 1).to(tl.int64)
    key = tl.load(cu_keys + number + 1).to(tl.int64) - (end - token)
    return token, token < queries, number, key, tl.load(cu_keys + number).to(tl.int64)


@triton.jit(do_not_specialize=SIZES)
def spans(
    cu_queries,
    cu_keys,
    cu_entries,
    low,
    high,
    queries,
    sequences,
    window,
    stride,
    ROWS: tl.constexpr,
    ENDS: tl.constexpr,
    COMPRESSED: tl.constexpr,
):
    """What some queries see: keys of a sliding window, or entries whose windows lie behind."""
    token, there, number, key, begin = _laid(cu_queries, cu_keys, queries, sequences, ROWS, ENDS)
    if COMPRESSED:
        first = tl.load(cu_entries + number).to(tl.int64)
        behind = tl.maximum(key - begin + 1 - window + stride, 0)
        last = first + behind // stride
    else:
        last = key + 1
        first = tl.maximum(begin, last - window)
    tl.store(low + token, first, mask=there)
    tl.store(high + token, last, mask=there)


@triton.jit(do_not_specialize=SIZES)
def place(
    cu_queries,
    cu_keys,
    last,
    own,
    sequence,
    queries,
    sequences,
    block,
    ROWS: tl.constexpr,
    ENDS: tl.constexpr,
):
    """The last key, own block and sequence of some queries."""
    token, there, number, key, begin = _laid(cu_queries, cu_keys, queries, sequences, ROWS, ENDS)
    position = tl.maximum(key - begin, 0)
    tl.store(last + token, key, mask=there)
    tl.store(own + token, position // block, mask=there)
    tl.store(sequence + token, number, mask=there)


@triton.jit(do_not_specialize=SIZES)
def cut(
    cumulative,
    first,
    length,
    sequence,
    before,
    most,
    sequences,
    block,
    ROWS: tl.constexpr,
    ENDS: tl.constexpr,
):
    """Some blocks of packed sequences, and by the first program the blocks before each sequence.

    Those behind the last block are counted to the last sequence, with no tokens.
    """
    numbered = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = numbered < most
    number = tl.zeros((ROWS,), tl.int64)
    passed = tl.zeros((ROWS,), tl.int64)
    total = tl.zeros((), tl.int64)
    for begin in range(0, sequences, ENDS):
        at = begin + tl.arange(0, ENDS)
        known = at < sequences
        tokens = tl.load(cumulative + at + 1, mask=known, other=0).to(tl.int64)
        tokens -= tl.load(cumulative + at, mask=known, other=0).to(tl.int64)
        counts = (tokens + block - 1) // block
        ends = total + tl.cumsum(counts, 0)
        if tl.program_id(0) == 0:
            tl.store(before + 1 + at, ends, mask=known)
        behind = (ends[None, :] <= numbered[:, None]) & (at < sequences - 1)[None, :]
        number += tl.sum(behind.to(tl.int32), 1)
        passed = tl.maximum(passed, tl.max(tl.where(behind, ends[None, :], 0), 1))
        total += tl.sum(counts, 0)
    if tl.program_id(0) == 0:
        tl.store(before, tl.zeros((), tl.int64))
    begins = tl.load(cumulative + number).to(tl.int64) + (numbered - passed) * block
    left = tl.load(cumulative + number + 1).to(tl.int64) - begins
    tl.store(first + numbered, begins, mask=there)
    tl.store(length + numbered, tl.minimum(tl.maximum(left, 0), block.to(tl.int64)), mask=there)
    tl.store(sequence + numbered, number, mask=there)


@triton.jit(do_not_specialize=SIZES)
def number(
    indices,
    own,
    sequence,
    before,
    out,
    queries,
    TOP: tl.constexpr,
    SLOTS: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Ids of some queries in ascending order, numbered through; wrong and repeated ones gone."""
    token = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    kv_head = tl.program_id(1).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    there = token < queries
    both = there[:, None] & (slot < TOP)[None, :]
    line = (kv_head * queries + token)[:, None] * TOP
    given = tl.load(indices + line + slot[None, :], mask=both, other=-1).to(tl.int64)
    last = tl.load(own + token, mask=there, other=-1)
    its_sequence = tl.load(sequence + token, mask=there, other=0)
    first = tl.load(before + its_sequence, mask=there, other=0)
    wrong = (given < 0) | (given > last[:, None])
    ids = tl.where(wrong, NONE, given).to(tl.int32)
    same = ids[:, :, None] == ids[:, None, :]
    earlier = slot[None, None, :] < slot[None, :, None]
    repeated = tl.sum((same & earlier).to(tl.int32), 2) > 0
    ids = tl.where(repeated, NONE, ids)
    known = ids != NONE
    rank = tl.sum((ids[:, None, :] < ids[:, :, None]).to(tl.int32), 2)
    count = tl.sum(known.to(tl.int32), 1)
    numbered = (ids + first[:, None]).to(tl.int32)
    tl.store(out + line + rank, numbered, mask=both & known)
    absent = slot[None, :] >= count[:, None]
    tl.store(
        out + line + slot[None, :], tl.full((QUERIES, SLOTS), -1, tl.int32), mask=both & absent
    )


@triton.jit
def _line(ids, line, head_stride, known, queries, pieces, TOP: tl.constexpr):
    """Where a line's ids begin, and how many of its queries are there."""
    before = (line % pieces) * queries
    there_are = tl.minimum(known - before, queries).to(tl.int32)
    return ids + (line // pieces) * head_stride + before * TOP, there_are


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ANYWHERE)
def count(
    ids,
    place,
    counts,
    head_stride,
    known,
    queries,
    pieces,
    tiles,
    blocks,
    TOP: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """How often a tile's queries name each block, and the place of each choice among them.

    What is counted of a tile is a line of ``counts [lines, tiles, blocks + 1]``; empty slots are
    counted in its last column. In ``place`` is written how many came before in the same column. One
    warp: its loads and stores take turns, and more of them would only wait for one another.

    Lines are pieces of ``queries`` of a KV head, which has ``known``.
    """
    line = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    slot = tl.arange(0, SLOTS)
    per_query = tl.full((), TOP, tl.int64)
    mine = counts + (line * tiles + tile) * (blocks + 1)
    for first_column in range(0, blocks + 1, COLUMNS):
        column = first_column + tl.arange(0, COLUMNS)
        tl.store(mine + column, tl.zeros((COLUMNS,), counts.dtype.element_ty), column <= blocks)
    tl.debug_barrier()
    ids, there_are = _line(ids, line, head_stride, known, queries, pieces, TOP)
    place += line * queries * TOP
    absent = tl.zeros((), counts.dtype.element_ty)
    end = tl.minimum(tile * TILE + TILE, queries)
    for first in range(tile * TILE, end, STEP):
        stop = tl.minimum(first + STEP, end)
        flat = first * per_query + tl.arange(0, STEP * SLOTS)
        within = flat < stop * per_query
        there = flat < there_are * per_query
        named = tl.load(ids + flat, mask=within & there, other=-1)
        gone = (within & ((named < 0) | (named >= blocks))).to(counts.dtype.element_ty)
        tl.store(place + flat, absent + tl.cumsum(gone, 0) - 1, mask=gone > 0)
        absent += tl.sum(gone, 0)
        for token in range(first, tl.minimum(stop, there_are)):
            at = token * per_query + slot
            column = tl.load(ids + at, mask=slot < TOP, other=-1)
            is_block = (column >= 0) & (column < blocks)
            number = tl.load(mine + column, mask=is_block, other=0)
            tl.debug_barrier()
            tl.store(mine + column, number + 1, mask=is_block)
            tl.store(place + at, number, mask=is_block)
            tl.debug_barrier()
    tl.store(mine + blocks, absent)


@triton.jit(do_not_specialize=SIZES)
def begin(
    counts,
    totals,
    rows,
    tiles,
    blocks,
    TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Makes of each count the sum of earlier tiles' counts, and writes that of all to ``totals``.

    The first of ``rows`` is 0; a sum over ``totals`` makes the others.
    """
    if tl.program_id(0) == 0:
        tl.store(rows, tl.zeros((), tl.int64))
    parts = tl.cdiv(blocks + 1, COLUMNS)
    line = (tl.program_id(0) // parts).to(tl.int64)
    column = (tl.program_id(0) % parts) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), counts.dtype.element_ty)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        both = (tile < tiles)[:, None] & (column <= blocks)[None, :]
        at = counts + (line * tiles + tile)[:, None] * (blocks + 1) + column[None, :]
        found = tl.load(at, mask=both, other=0)
        tl.store(at, total[None, :] + tl.cumsum(found, 0) - found, mask=both)
        total += tl.sum(found, 0)
    tl.store(totals + line * blocks + column, total.to(tl.int64), mask=column < blocks)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ANYWHERE)
def scatter(
    ids,
    place,
    counts,
    rows,
    query,
    head_stride,
    known,
    queries,
    pieces,
    lines,
    tiles,
    blocks,
    TOP: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Puts each query in its place of each row; those of empty slots lie behind all rows."""
    parts = tl.cdiv(queries, QUERIES)
    line = (tl.program_id(0) // parts).to(tl.int64)
    token = (tl.program_id(0) % parts) * QUERIES + tl.arange(0, QUERIES)
    slot = tl.arange(0, SLOTS)
    ids, there_are = _line(ids, line, head_stride, known, queries, pieces, TOP)
    both = (token < queries)[:, None] & (slot < TOP)[None, :]
    there = both & (token < there_are)[:, None]
    at = token.to(tl.int64)[:, None] * TOP + slot[None, :]
    named = tl.load(ids + at, mask=there, other=-1)
    is_block = (named >= 0) & (named < blocks)
    column = tl.where(is_block, named, blocks)
    place += line * queries * TOP
    of_tile = (line * tiles + token // TILE)[:, None] * (blocks + 1)
    before = tl.load(counts + of_tile + column, mask=both, other=0).to(tl.int64)
    before += tl.load(place + at, mask=both, other=0)
    row = line * blocks
    first = tl.load(rows + row + column, mask=is_block, other=0)
    last = tl.load(rows + lines.to(tl.int64) * blocks)
    behind = last + line * queries * TOP - tl.load(rows + row)
    goal = tl.where(is_block, first, behind) + before
    tl.store(query + goal, tl.broadcast_to(token[:, None], (QUERIES, SLOTS)), mask=both)
    goal = tl.where(is_block, goal, -1).to(place.dtype.element_ty)
    tl.store(place + at, goal, mask=both)


@triton.jit(
    do_not_specialize=("row_count", "most", "group"), do_not_specialize_on_alignment=ANYWHERE
)
def items(
    lengths,
    item_row,
    item_chunk,
    further,
    row_count,
    most,
    group,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The work items of some rows of a segment, in the order of a stable sort by their size.

    Whole chunks come first, row after row; then what is left of rows, the longest first, each at
    as many places as there are longer ones. Each program looks at all rows of its segment for that.
    """
    parts = tl.cdiv(row_count, ROWS)
    segment = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    lengths += segment * row_count
    item_row += segment * most
    item_chunk += segment * most
    further += segment * (row_count + 1)
    row = part * ROWS + tl.arange(0, ROWS)
    length = tl.load(lengths + row, mask=row < row_count, other=0) * group
    left = (length % CHUNK).to(tl.int32)
    rank = tl.zeros((ROWS,), tl.int64)
    wholes = tl.zeros((ROWS,), tl.int64)
    wholes_before = tl.zeros((ROWS,), tl.int64)
    more_before = tl.zeros((ROWS,), tl.int64)
    lefts = tl.zeros((ROWS,), tl.int64)
    for first in range(0, row_count, ROWS):
        other = first + tl.arange(0, ROWS)
        theirs = tl.load(lengths + other, mask=other < row_count, other=0) * group
        their_left = (theirs % CHUNK).to(tl.int32)
        whole = theirs // CHUNK
        passed = other < part * ROWS
        wholes += whole
        wholes_before += tl.where(passed, whole, 0)
        more = tl.maximum((theirs + CHUNK - 1) // CHUNK - 1, 0)
        more_before += tl.where(passed, more, 0)
        lefts += (their_left > 0).to(tl.int64)
        longer = their_left[None, :] > left[:, None]
        alike = (their_left[None, :] == left[:, None]) & (other[None, :] < row[:, None])
        rank += tl.sum((longer | alike).to(tl.int32), 1)
    all_wholes = tl.sum(wholes, 0)
    whole = length // CHUNK
    more = tl.maximum((length + CHUNK - 1) // CHUNK - 1, 0)
    more = tl.sum(more_before, 0) + tl.cumsum(more, 0)
    tl.store(further + row + 1, more, mask=row < row_count)
    if part == 0:
        tl.store(further, tl.zeros((), tl.int64))
    tl.store(item_row + all_wholes + rank, row, mask=left > 0)
    tl.store(item_chunk + all_wholes + rank, whole.to(tl.int32), mask=left > 0)
    place = tl.sum(wholes_before, 0) + tl.cumsum(whole, 0) - whole
    for first in range(0, tl.max(whole, 0).to(tl.int32), WIDE):
        chunk = first + tl.arange(0, WIDE)
        there = chunk[None, :] < whole[:, None]
        at = place[:, None] + chunk[None, :]
        tl.store(item_row + at, tl.broadcast_to(row[:, None], (ROWS, WIDE)), mask=there)
        its_chunk = tl.broadcast_to(chunk[None, :], (ROWS, WIDE)).to(tl.int32)
        tl.store(item_chunk + at, its_chunk, mask=there)
    known = (all_wholes + tl.sum(lefts, 0)).to(tl.int32)
    behind = (tl.load(lengths + row_count - 1) * group + CHUNK - 1) // CHUNK - known
    for first in range(known + part * WIDE, most, parts * WIDE):
        at = first + tl.arange(0, WIDE)
        tl.store(item_row + at, tl.full((WIDE,), -1, tl.int32), mask=at < most)
        tl.store(item_chunk + at, (at + behind).to(tl.int32), mask=at < most)
