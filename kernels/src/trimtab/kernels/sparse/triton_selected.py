"""Selected attention on a GPU, a KV block at a time: its keys are read once for all their queries.
For large groups, whose heads fill a tile, the forward can go a query at a time instead.

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

ANYWHERE = ("rows", "item_row", "item_chunk", "further", "lse", "delta", "last", "place")
"""Where segments begin in these is aligned or not; nothing is gained by a kernel for each case."""

WHOLE = tl.constexpr(0)
MAXIMA = tl.constexpr(1)
SHIFTED = tl.constexpr(2)

AS_THEY_ARE = tl.constexpr(0)
FINITE = tl.constexpr(1)
ODD = tl.constexpr(2)
"""A weight of 0 times infinity, or what is no number, is not 0. So a kernel says of each tile and
head whether anything odd came out. Launched again, a program looks at all heads of its tile, and
does these anew: they take what is odd for 0, and then add what of that their queries see."""

_MINUS = tl.constexpr(2.0**-10)
"""What minus infinity counts as where plus infinity is 1: a tile has at most 128 keys."""


@triton.jit
def _has_to(flags, count, AGAIN: tl.constexpr):
    """Whether any of ``count`` results is to be found, or was odd."""
    if AGAIN:
        found = 0
        for at in range(0, count, 128):
            number = at + tl.arange(0, 128)
            found |= tl.max(tl.load(flags + number, mask=number < count, other=0))
        return found != 0
    else:
        return True


@triton.jit
def _due(flag, AGAIN: tl.constexpr):
    """A program's tile, and whether it has to be done for a head.

    Launched again, the tile is read: a compiler that knew it would work out for all heads at once
    where its numbers lie, and keep that in registers that there are not.
    """
    if AGAIN:
        number = tl.load(flag)
        return tl.maximum(number - 1, 0).to(tl.int64), number > 0
    else:
        return tl.program_id(0).to(tl.int64), True


@triton.jit
def _note(flag, result):
    """Says of a program's tile whether anything odd came out: its number from 1 on, or 0."""
    tl.store(flag, _any_odd(result) * (tl.program_id(0) + 1))


@triton.jit
def _item(item_row, item_chunk, rows, GROUP: tl.constexpr, CHUNK: tl.constexpr):
    """A work item: its row and chunk, and its rows of tiles, from where the segment's begin.

    Absent items are of row -1, and have no rows.
    """
    row = tl.load(item_row + tl.program_id(0)).to(tl.int64)
    chunk = tl.load(item_chunk + tl.program_id(0)).to(tl.int64)
    known = row >= 0
    base = tl.load(rows)
    begin = (tl.load(rows + row, mask=known, other=0) - base) * GROUP + chunk * CHUNK
    end = (tl.load(rows + row + 1, mask=known, other=0) - base) * GROUP
    return row, chunk, base, begin, tl.minimum(begin + CHUNK, end)


@triton.jit
def _rows(begin, stop, base, query, kv_head, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """What a tile holds of an item: rows, whether each is there, its query and head."""
    at = begin + tl.arange(0, ROWS)
    there = at < stop
    token = tl.load(query + base + at // GROUP, mask=there, other=0).to(tl.int64)
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
def _put(
    pointer, token, head, there, value, HEADS: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr
):
    """Writes what `_tile` reads."""
    column = tl.arange(0, PAD)
    address = (token * HEADS + head)[:, None] * D + column[None, :]
    value = value.to(pointer.dtype.element_ty)
    tl.store(pointer + address, value, mask=there[:, None] & (column < D)[None, :])


@triton.jit
def _to_natural(top, total):
    """The natural logarithm of a sum of powers of two, ``total`` times ``2 ** top``."""
    safe = tl.where(total == 0, 1.0, total)
    return tl.where(total == 0, float("-inf"), (top + tl.log2(safe)) / LOG2_E)


@triton.jit
def _attend(acc, total, top, logits, visible, values, WIDEN: tl.constexpr):
    """Adds keys to an online softmax: sums of values and of weights, shifted by the maxima."""
    logits = tl.where(visible, logits, LEAST)
    new = tl.maximum(top, tl.max(logits, 1))
    p = tl.where(visible, tl.exp2(logits - new[:, None]), 0.0)
    kept = tl.exp2(top - new)
    acc = acc * kept[:, None] + _dot(p.to(values.dtype), values, WIDEN)
    return acc, total * kept + tl.sum(p, 1), new


@triton.jit
def _any_odd(x):
    """Whether anything is infinite or no number, as int32."""
    return tl.max(tl.where(tl.abs(x.to(tl.float32)) < float("inf"), 0, 1))


@triton.jit
def _finite(x):
    """With 0 for what is infinite or no number."""
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0).to(x.dtype)


@triton.jit
def _mark(marks, visible, values):
    """Adds what rows see of infinities: 1 and `_MINUS`, and of no number both, as their sum is."""
    values = values.to(tl.float32)
    codes = tl.where(values < float("inf"), 0.0, 1.0)
    codes += tl.where(values > float("-inf"), 0.0, _MINUS)
    marks += _dot(visible.to(tl.float16), codes.to(tl.float16), False)
    whole = tl.floor(marks)
    return tl.minimum(whole, 1.0) + tl.minimum(marks - whole, _MINUS)


@triton.jit
def _put_marked(
    pointer,
    token,
    head,
    there,
    marks,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    PAD: tl.constexpr,
    JOINED: tl.constexpr,
):
    """Writes the infinities that `_mark` found over what `_put` wrote, and their sum for both.

    Where parts were ``JOINED``, what was written may be odd by them: so it counts too.
    """
    column = tl.arange(0, PAD)
    address = (token * HEADS + head)[:, None] * D + column[None, :]
    mask = there[:, None] & (column < D)[None, :] & (marks > 0)
    value = tl.where(marks >= 1, float("inf"), float("-inf"))
    no_number = marks > 1
    if JOINED:
        before = tl.load(pointer + address, mask=mask, other=0.0).to(tl.float32)
        no_number = no_number | (before != before) | (before == -value)
    value = tl.where(no_number, float("nan"), value)
    tl.store(pointer + address, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _meet(
    acc,
    total,
    top,
    query,
    keys,
    values,
    visible,
    scale,
    ATTEMPT: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Adds keys to what an attempt sums up: an online softmax, or the marks of odd values."""
    if ATTEMPT == ODD:
        acc = _mark(acc, visible, values)
    else:
        if ATTEMPT == FINITE:
            values = _finite(values)
        logits = _dot(query, tl.trans(keys), WIDEN) * (scale * LOG2_E)
        acc, total, top = _attend(acc, total, top, logits, visible, values, WIDEN)
    return acc, total, top


@triton.jit
def _write(
    out,
    token,
    head,
    there,
    acc,
    total,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    PAD: tl.constexpr,
    ATTEMPT: tl.constexpr,
    JOINED: tl.constexpr = False,
):
    """Writes what an attempt has summed up; marks over what the one before wrote, if a number."""
    if ATTEMPT == ODD:
        tl.debug_barrier()
        _put_marked(out, token, head, there & (total == total), acc, HEADS, D, PAD, JOINED)
    else:
        result = acc / tl.where(total > 0, total, 1.0)[:, None]
        _put(out, token, head, there, result, HEADS, D, PAD)


@triton.jit
def _slopes(
    query, keys, values, above, stat, lse, delta, there, visible, scale, WIDEN: tl.constexpr
):
    """Probabilities of a tile, and the gradients of its logits; ``stat`` is where its sums lie."""
    shift = tl.load(lse + stat, mask=there, other=0.0) * LOG2_E
    its_delta = tl.load(delta + stat, mask=there, other=0.0)
    logits = _dot(query, tl.trans(keys), WIDEN) * (scale * LOG2_E)
    p = tl.exp2(tl.where(visible, logits - shift[:, None], LEAST))
    dp = _dot(above, tl.trans(values), WIDEN)
    return p, tl.where(visible, p * (dp - its_delta[:, None]) * scale, 0.0)


@triton.jit
def _block(block_first, block_length, block, BLOCK: tl.constexpr):
    """The tokens of a block, and which of them are there."""
    column = tl.arange(0, BLOCK)
    return tl.load(block_first + block) + column, column < tl.load(block_length + block)


@triton.jit(do_not_specialize_on_alignment=ANYWHERE)
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
    CHUNK: tl.constexpr,
    WIDEN: tl.constexpr,
    PASS: tl.constexpr,
):
    """One chunk of one block's queries: partial outputs, their maxima and sums.

    Parts are normalised, and shifted by their own maxima. FSA's published passes are `MAXIMA`,
    which writes nothing else, and `SHIFTED`, by the ``part_max`` it is given, not normalised.
    """
    row, _, base, begin, stop = _item(item_row, item_chunk, rows, GROUP, CHUNK)
    if row >= 0:
        kv_head = row // blocks
        key, inside = _block(block_first, block_length, row % blocks, BLOCK)
        keys = _tile(k, key, kv_head, inside, HEADS // GROUP, D, PAD)
        if PASS != MAXIMA:
            values = _tile(v, key, kv_head, inside, HEADS // GROUP, D_V, PAD_V)
        for passed in range(0, (stop - begin).to(tl.int32), ROWS):
            offset = begin + passed
            at, there, token, head = _rows(offset, stop, base, query, kv_head, GROUP, ROWS)
            queries = _tile(q, token, head, there, HEADS, D, PAD)
            own = tl.load(last + token, mask=there, other=-1)
            visible = inside[None, :] & (key[None, :] <= own[:, None])
            logits = _dot(queries, tl.trans(keys), WIDEN) * (scale * LOG2_E)
            logits = tl.where(visible, logits, LEAST)
            if PASS == SHIFTED:
                top = tl.load(part_max + at, mask=there, other=0.0)
            else:
                top = tl.max(logits, 1)
                tl.store(part_max + at, top, mask=there)
            if PASS != MAXIMA:
                p = tl.where(visible, tl.exp2(logits - top[:, None]), 0.0)
                total = tl.sum(p, 1)
                out = _dot(p.to(values.dtype), values, WIDEN)
                if PASS == WHOLE:
                    out = out / tl.maximum(total, 1e-30)[:, None]
                tl.store(part_sum + at, total, mask=there)
                _put(part, at, 0, there, out, 1, D_V, PAD_V)


@triton.jit(do_not_specialize_on_alignment=ANYWHERE)
def merge(
    part,
    part_max,
    part_sum,
    rows,
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
    """FSA's published last pass: joins the parts of one query's group, in the order of its blocks.

    Each is shifted by its ``part_max``.
    """
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    member = tl.arange(0, GROUP_PAD)
    column = tl.arange(0, PAD_V)
    there = member < GROUP
    both = there[:, None] & (column < D_V)[None, :]
    top = tl.full((GROUP_PAD,), LEAST, tl.float32)
    total = tl.zeros((GROUP_PAD,), tl.float32)
    acc = tl.zeros((GROUP_PAD, PAD_V), tl.float32)
    base = tl.load(rows)
    for slot in range(TOP):
        entry = tl.load(place + (kv_head * queries + token) * TOP + slot).to(tl.int64)
        at = (entry - base) * GROUP + member
        known = there & (at >= 0)
        its_top = tl.load(part_max + at, mask=known, other=LEAST)
        its_sum = tl.load(part_sum + at, mask=known, other=0.0)
        its_out = tl.load(
            part + at[:, None] * D_V + column[None, :], mask=both & known[:, None], other=0.0
        ).to(tl.float32)
        new = tl.maximum(top, its_top)
        kept = tl.exp2(top - new)
        scaled = tl.exp2(its_top - new)
        acc = acc * kept[:, None] + its_out * scaled[:, None]
        total = total * kept + its_sum * scaled
        top = new
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    head = kv_head * GROUP + member
    _put(out, token, head, there, result, HEADS, D_V, PAD_V)
    tl.store(lse + token * HEADS + head, _to_natural(top, total), mask=there)


@triton.jit
def by_query(
    q,
    k,
    v,
    ids,
    out,
    lse,
    block_first,
    block_length,
    last,
    scale,
    queries,
    TOP: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    PAD: tl.constexpr,
    PAD_V: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Output and logarithm of one query's group, block after block: vanilla NSA's loop order."""
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    member = tl.arange(0, GROUP_PAD)
    there = member < GROUP
    head = kv_head * GROUP + member
    query = _tile(q, token, head, there, HEADS, D, PAD)
    own = tl.load(last + token)
    top = tl.full((GROUP_PAD,), LEAST, tl.float32)
    total = tl.zeros((GROUP_PAD,), tl.float32)
    acc = tl.zeros((GROUP_PAD, PAD_V), tl.float32)
    for slot in range(TOP):
        number = tl.load(ids + (kv_head * queries + token) * TOP + slot)
        key, inside = _block(block_first, block_length, tl.maximum(number, 0), BLOCK)
        seen = inside & (key <= own) & (number + tl.zeros((BLOCK,), tl.int64) >= 0)
        keys = _tile(k, key, kv_head, seen, HEADS // GROUP, D, PAD)
        values = _tile(v, key, kv_head, seen, HEADS // GROUP, D_V, PAD_V)
        logits = _dot(query, tl.trans(keys), WIDEN) * (scale * LOG2_E)
        visible = there[:, None] & seen[None, :]
        acc, total, top = _attend(acc, total, top, logits, visible, values, WIDEN)
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    _put(out, token, head, there, result, HEADS, D_V, PAD_V)
    tl.store(lse + token * HEADS + head, _to_natural(top, total), mask=there)


@triton.jit(do_not_specialize_on_alignment=ANYWHERE)
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
    further_k,
    further_v,
    rows,
    query,
    item_row,
    item_chunk,
    further,
    block_first,
    block_length,
    last,
    odd,
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
    CHUNK: tl.constexpr,
    WIDEN: tl.constexpr,
    AGAIN: tl.constexpr,
):
    """One chunk of one block's queries: dK and dV, in float32 over the group, and parts of dQ.

    A block's first chunk is added to what earlier segments found. Its further ones are written to
    places of their own, and `add_chunks` adds them in their order. Keys that are infinite or no
    numbers reach parts of dQ alone, of queries that see them, and a second attempt writes these.
    """
    row, chunk, base, begin, stop = _item(item_row, item_chunk, rows, GROUP, CHUNK)
    if AGAIN:
        row = tl.where(tl.load(odd + tl.program_id(0)) != 0, row, -1)
    if row >= 0:
        kv_head = row // blocks
        key, inside = _block(block_first, block_length, row % blocks, BLOCK)
        keys = _tile(k, key, kv_head, inside, HEADS // GROUP, D, PAD)
        values = _tile(v, key, kv_head, inside, HEADS // GROUP, D_V, PAD_V)
        if AGAIN:
            wrong = tl.max((keys != _finite(keys)).to(tl.int32), 1) != 0
            keys = _finite(keys)
        else:
            former = inside & (chunk + tl.zeros((BLOCK,), tl.int64) == 0)
            sum_k = _tile(dk, key, kv_head, former, HEADS // GROUP, D, PAD)
            sum_v = _tile(dv, key, kv_head, former, HEADS // GROUP, D_V, PAD_V)
        for offset in range(begin, stop, ROWS):
            at, there, token, head = _rows(offset, stop, base, query, kv_head, GROUP, ROWS)
            queries = _tile(q, token, head, there, HEADS, D, PAD)
            above = _tile(gradient, token, head, there, HEADS, D_V, PAD_V)
            own = tl.load(last + token, mask=there, other=-1)
            visible = inside[None, :] & (key[None, :] <= own[:, None])
            stat = token * HEADS + head
            p, ds = _slopes(
                queries, keys, values, above, stat, lse, delta, there, visible, scale, WIDEN
            )
            if AGAIN:
                ds = tl.where(visible & wrong[None, :], float("nan"), ds)
            ds = ds.to(queries.dtype)
            if not AGAIN:
                sum_v += _dot(tl.trans(p).to(above.dtype), above, WIDEN)
                sum_k += _dot(tl.trans(ds), queries, WIDEN)
            slope = _dot(ds, keys, WIDEN)
            _put(dq_part, at, 0, there, slope, 1, D, PAD)
        if not AGAIN:
            _note(odd + tl.program_id(0), keys)
        if AGAIN:
            pass
        elif chunk == 0:
            _put(dk, key, kv_head, inside, sum_k, HEADS // GROUP, D, PAD)
            _put(dv, key, kv_head, inside, sum_v, HEADS // GROUP, D_V, PAD_V)
        else:
            line = (tl.load(further + row) + chunk - 1) * BLOCK + tl.arange(0, BLOCK)
            _put(further_k, line, 0, inside, sum_k, 1, D, PAD)
            _put(further_v, line, 0, inside, sum_v, 1, D_V, PAD_V)


@triton.jit(do_not_specialize_on_alignment=ANYWHERE)
def add_chunks(
    dk,
    dv,
    further_k,
    further_v,
    further,
    block_first,
    block_length,
    blocks,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    PAD: tl.constexpr,
    PAD_V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds a block's further chunks of dK and dV to its first, in their order."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(further + row)
    end = tl.load(further + row + 1)
    if begin < end:
        kv_head = row // blocks
        key, inside = _block(block_first, block_length, row % blocks, BLOCK)
        sum_k = _tile(dk, key, kv_head, inside, HEADS // GROUP, D, PAD)
        for at in range(begin, end):
            line = at * BLOCK + tl.arange(0, BLOCK)
            sum_k += _tile(further_k, line, 0, inside, 1, D, PAD)
        _put(dk, key, kv_head, inside, sum_k, HEADS // GROUP, D, PAD)
        sum_v = _tile(dv, key, kv_head, inside, HEADS // GROUP, D_V, PAD_V)
        for at in range(begin, end):
            line = at * BLOCK + tl.arange(0, BLOCK)
            sum_v += _tile(further_v, line, 0, inside, 1, D_V, PAD_V)
        _put(dv, key, kv_head, inside, sum_v, HEADS // GROUP, D_V, PAD_V)


@triton.jit(do_not_specialize_on_alignment=ANYWHERE)
def sum_parts(
    part,
    rows,
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
    base = tl.load(rows)
    for slot in range(TOP):
        entry = tl.load(place + (kv_head * queries + token) * TOP + slot).to(tl.int64)
        at = (entry - base) * GROUP + member
        known = both & (at >= 0)[:, None]
        acc += tl.load(part + at[:, None] * D + column[None, :], mask=known, other=0.0)
    _put(out, token, kv_head * GROUP + member, member < GROUP, acc, HEADS, D, PAD)
