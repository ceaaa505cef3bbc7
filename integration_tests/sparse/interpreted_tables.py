"""Makes index tables by Triton kernels; fails where they are not those of torch, bit for bit.

On a GPU, or without one in Triton's interpreter.
"""

from __future__ import annotations

from contextlib import contextmanager
from unittest.mock import patch

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import InterpreterBuilder

from trimtab.kernels.sparse import block_lists, launch_tables, tables
from trimtab.kernels.sparse.launch import interpreted

DEVICE = "cpu" if interpreted() else "cuda"
torch.set_default_device(DEVICE)


@contextmanager
def in_torch():
    with (
        patch.object(launch_tables, "_on_triton", lambda x: False),
        patch.object(block_lists, "code", lambda: None),
    ):
        yield


def same(ours, theirs):
    for name in type(ours).__slots__:
        a, b = getattr(ours, name), getattr(theirs, name)
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), (name, a, b)


def ends(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def drawn(seed, spans, kv_heads, top, block, kind):
    """Ids that queries of sequences with ``(queries, keys)`` tokens chose, and where all lie."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    queries, keys = ([a for a, _ in spans], [b for _, b in spans])
    most = max(keys) // block + 2
    sizes = (kv_heads, sum(queries), top)
    ids = torch.randint(-2, most, sizes, generator=generator)
    if kind == "same":
        ids = torch.zeros_like(ids)
    elif kind == "none":
        ids = ids.masked_fill(torch.rand(sizes[:2], generator=generator)[..., None] < 0.7, -1)
    elif kind == "long":
        ids = ids + (torch.rand(sizes, generator=generator) < 0.3).long() * (1 << 33)
    placed = tables.place_queries(ends(queries), ends(keys), sum(queries), block)
    blocks = tables.cut(ends(keys), sum(keys), block)
    return ids if kind == "long" else ids.int(), placed, blocks


def by_hand(ids, own, before):
    """What `tables.number_through` must be, query by query."""
    found = []
    for of_head in ids.tolist():
        lists = zip(of_head, own.tolist(), before.tolist(), strict=True)
        rows = [sorted({i + first for i in row if 0 <= i <= last}) for row, last, first in lists]
        found.append([row + [-1] * (ids.shape[2] - len(row)) for row in rows])
    return found


spans = st.lists(
    st.integers(1, 14).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n))),
    min_size=1,
    max_size=3,
)


@settings(max_examples=15, deadline=None, database=None)
@given(
    st.integers(0, 99),
    spans,
    st.integers(1, 2),
    st.integers(1, 16),
    st.sampled_from(["any", "same", "none", "long"]),
    st.integers(1, 9),
    st.sampled_from([1, 4, 32]),
)
def tables_are_those_of_torch(seed, spans, kv_heads, top, kind, step, tile):
    ids, placed, blocks = drawn(seed, spans, kv_heads, top, 2, kind)
    numbered = tables.number_through(ids, placed, blocks)
    assert numbered.tolist() == by_hand(ids, placed.own, blocks.before[placed.sequence])
    count = blocks.first.numel()
    with patch.object(launch_tables, "tile_of", lambda *_: tile):
        table = tables.block_major(numbered, count, step)
    with in_torch():
        assert torch.equal(numbered, tables.number_through(ids, placed, blocks))
        same(table, tables.block_major(numbered, count, step))


@settings(max_examples=30, deadline=None, database=None)
@given(
    st.integers(1, 3).flatmap(
        lambda rows: st.lists(
            st.lists(st.integers(0, 40), min_size=rows, max_size=rows), min_size=1, max_size=3
        )
    ),
    st.integers(1, 9),
    st.integers(0, 30),
    st.integers(0, 70),
    st.sampled_from([1, 3]),
)
def items_are_those_of_torch(lengths, size, spare, empty_rows, group):
    most = max(sum(row) for row in lengths) + spare
    lengths = torch.tensor([[*row, *[0] * empty_rows, row[0]] for row in lengths])
    most += int(lengths[:, -1].max())
    ours = tables.work(lengths, group, group * most, size)
    with in_torch():
        same(ours, tables.work(lengths, group, group * most, size))


def one_large():
    """Lists of 64, in tiles as they are launched, and rows enough for several programs."""
    generator = torch.Generator(DEVICE).manual_seed(5)
    spans = [(34, 90), (6, 6)]
    for top in (64, 65):
        ids, placed, blocks = drawn(6, spans, 1, top, 2, "any")
        numbered = tables.number_through(ids, placed, blocks)
        count = blocks.first.numel()
        assert launch_tables.tile_of(top, count) < 40
        table = tables.block_major(numbered, count)
        lengths = table.lengths.view(1, -1)
        work = tables.work(lengths, 3, 3 * table.query.numel(), 16)
        with in_torch():
            assert torch.equal(numbered, tables.number_through(ids, placed, blocks))
            same(table, tables.block_major(numbered, count))
            same(work, tables.work(lengths, 3, 3 * table.query.numel(), 16))
    ids, placed, blocks = drawn(8, [(40, 90)], 1, 3, 16, "any")
    numbered = tables.number_through(ids, placed, blocks)
    with patch.object(launch_tables, "tile_of", lambda *_: 1):  # more than are added up at once
        table = tables.block_major(numbered, blocks.first.numel())
    with in_torch():
        same(table, tables.block_major(numbered, blocks.first.numel()))
    lengths = torch.randint(0, 50, (2, 150), generator=generator)
    lengths[0, 70] = 2000
    work = tables.work(lengths, 1, 10_000, 8)
    with in_torch():
        same(work, tables.work(lengths, 1, 10_000, 8))


def bytes_are_few():
    """What kernels load and store of a table whose queries choose half of their slots."""
    moved = dict.fromkeys(("load", "store"), 0)

    def counting(kind, method, mask_at):
        def counted(self, pointers, *others):
            bits = pointers.get_element_ty().primitive_bitwidth
            moved[kind] += int(others[mask_at].data.sum()) * bits // 8
            return method(self, pointers, *others)

        return counted

    lines, queries, blocks, tile, size = 2, 30, 9, 8, 16
    ids = torch.arange(4).repeat(lines, queries, 1).masked_fill(torch.arange(4) > 1, -1).int()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    with (
        patch.object(InterpreterBuilder, "create_masked_load", counting("load", load, 0)),
        patch.object(InterpreterBuilder, "create_masked_store", counting("store", store, 1)),
        patch.object(launch_tables, "tile_of", lambda *_: tile),
    ):
        table = tables.block_major(ids, blocks)
        slots, choices, rows, tiles = ids.numel(), int(table.rows[-1]), lines * blocks, 4
        columns = lines * tiles * (blocks + 1)
        programs = lines  # of one kernel, since all queries of a line fit one
        assert moved["load"] == (
            (4 + 4 + 4 + 4 + 4) * slots + (4 + 8) * choices + 4 * columns + 16 * programs
        )
        assert moved["store"] == (
            (4 + 4 + 4) * slots + 4 * choices + (4 + 4) * columns + 4 * lines * tiles + 8 * rows + 8
        )
        moved.update(load=0, store=0)
        work = tables.work(table.lengths.view(1, -1), 1, slots, size)
        assert moved["load"] == (8 + 8) * rows + 8
        assert moved["store"] == 8 * work.row.numel() + 8 * (rows + 1)
        placed = tables.place_queries(ends([queries]), ends([queries]), queries, 4)
        cut = tables.cut(ends([queries]), queries, 4)
        moved.update(load=0, store=0)
        tables.number_through(ids, placed, cut)
        assert moved["load"] == 4 * slots + 24 * lines * queries
        assert moved["store"] == 4 * slots


@settings(max_examples=40, deadline=None, database=None)
@given(
    st.lists(
        st.integers(0, 20).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([1, 4, 16]),
    st.integers(1, 3),
    st.sampled_from([torch.int32, torch.int64]),
)
def places_are_those_of_torch(spans, block, at_once, dtype):
    """Of queries and blocks, where some sequences have none; ends are looked at in parts."""
    cu_q, cu_k = (ends(counts).to(dtype) for counts in zip(*spans, strict=True))
    queries, keys = int(cu_q[-1]), int(cu_k[-1])
    cu_e = ends([max(0, b // 3 - at_once) for _, b in spans]).to(dtype)
    how = {"ROWS": 8, "ENDS": 1 << at_once, "num_warps": 4}
    with patch.object(launch_tables, "constants", lambda kernel: how):
        placed = tables.place_queries(cu_q, cu_k, queries, block)
        blocks = tables.cut(cu_k, keys, block)
        seen = tables.sees_window(cu_q, cu_k, queries, 3 * block)
        entries = tables.sees_entries(cu_q, cu_k, cu_e, queries, 2 * block + 1, at_once)
    with in_torch():
        expected = tables.sees_window(cu_q, cu_k, queries, 3 * block)
        assert all(map(torch.equal, seen, expected))
        expected = tables.sees_entries(cu_q, cu_k, cu_e, queries, 2 * block + 1, at_once)
        assert all(map(torch.equal, entries, expected))
        same(placed, tables.place_queries(cu_q, cu_k, queries, block))
        same(blocks, tables.cut(cu_k, keys, block))


def parts_of_a_call_are_taken_where_they_lie():
    ids, placed, blocks = drawn(7, [(20, 20)], 4, 3, 2, "any")
    numbered = tables.number_through(ids, placed, blocks)
    wide = torch.stack([numbered, numbered.flip(1)], -1)[..., 0]
    part = numbered[1:3, 5:18]
    with in_torch():
        expected = tables.block_major(part, blocks.first.numel(), 5)
    for some in (part, wide[1:3, 5:18]):
        same(tables.block_major(some, blocks.first.numel(), 5), expected)
    assert expected.place.shape == (6, 5, 3)


places_are_those_of_torch()
tables_are_those_of_torch()
items_are_those_of_torch()
one_large()
parts_of_a_call_are_taken_where_they_lie()
if interpreted():
    bytes_are_few()
