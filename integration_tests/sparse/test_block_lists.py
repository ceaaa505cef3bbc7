"""Lists of blocks by compiled code on a CPU, against the mathematics in plain torch."""

from __future__ import annotations

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.kernels.sparse import (
    SparseShape,
    block_lists,
    compiled,
    naive,
    select_blocks,
    tables,
)

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(block_lists.code() is None, reason="no compiler was there at set-up"),
]

FOLDER = Path(block_lists.__file__).parent
BUILDS = [ctypes.CDLL(str(path)) for path in sorted(FOLDER.glob("block_lists_*.so"))]
builds = st.sampled_from([b for b in BUILDS if b.trimtab_supported()] or [None])

SHAPES = (
    SparseShape(window=8, stride=4, block=16, top=3, first=1, recent=1),
    SparseShape(window=4, stride=4, block=16, top=4, first=0, recent=0),
    SparseShape(window=32, stride=8, block=32, top=5, first=2, recent=2),
    SparseShape(window=1, stride=1, block=2, top=40, first=1, recent=2),
)


def ends(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def drawn(seed, heads, kv_heads, d, lengths, shape, dtype=torch.float32):
    """Queries, entries and ends of sequences that have ``(queries, keys)`` tokens."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(sum(a for a, _ in lengths), heads, d, generator=generator).to(dtype)
    counts = [shape.entries(b) for _, b in lengths]
    entries = torch.randn(sum(counts), kv_heads, d, generator=generator).to(dtype)
    every = (ends([a for a, _ in lengths]), ends([b for _, b in lengths]), ends(counts))
    return q, entries, *every


def scores_of(q, entries, keys, shape, scale):
    """Scores of the blocks of one sequence in double precision, ``[kv_heads, queries, blocks]``."""
    q, entries = q.double(), entries.double()
    p = naive.compressed(q, entries, entries, keys, shape, scale)[2]
    return naive.importance(p, keys, entries.shape[1], shape)


def assert_best(chosen, scores, at, shape):
    """Every list ascends, has what is forced, and nothing that is left out scores higher."""
    for of_head, its_scores in zip(chosen, scores, strict=True):
        for row, score, position in zip(of_head.tolist(), its_scores, at.tolist(), strict=True):
            own = position // shape.block
            ids = [i for i in row if i >= 0]
            assert row == sorted(set(ids)) + [-1] * (shape.top - len(ids))
            assert len(ids) == min(shape.top, own + 1)
            forced = {i for i in range(own + 1) if i < shape.first or i > own - shape.recent}
            assert forced <= set(ids) <= set(range(own + 1))
            free = [i for i in range(own + 1) if i not in forced]
            best = score[free].sort(descending=True).values[: shape.top - len(forced)]
            taken = score[[i for i in ids if i not in forced]].sort(descending=True).values
            torch.testing.assert_close(taken, best, rtol=1e-5, atol=1e-12)


lengths = st.lists(
    st.integers(1, 150).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n))),
    min_size=1,
    max_size=3,
)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 99),
    st.sampled_from([(1, 1), (3, 1), (4, 2), (5, 5)]),
    st.sampled_from([1, 8, 20]),
    lengths,
    st.sampled_from(SHAPES),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    builds,
)
def test_queries_choose_the_blocks_that_score_highest(seed, heads, d, spans, shape, dtype, build):
    q, entries, *every = drawn(seed, *heads, d, spans, shape, dtype)
    with patch.object(block_lists, "code", lambda: build):
        chosen = block_lists.select(q, entries, *every, shape, d**-0.5)
    bounds = [pairwise(x.tolist()) for x in every]
    for (a, b), (c, e), (f, g) in zip(*bounds, strict=True):
        keys = e - c
        scores = scores_of(q[a:b], entries[f:g], keys, shape, d**-0.5)
        at = naive.positions(b - a, keys, q.device)
        assert_best(chosen[:, a:b], scores, at, shape)


def test_among_equal_scores_the_lower_block_wins():
    shape = SparseShape(window=4, stride=4, block=16, top=5, first=1, recent=1)
    keys = 16 * 30
    q = torch.randn(keys, 2, 7)
    alike = torch.randn(1, 1, 7).expand(120, -1, -1)
    every = (ends([keys]), ends([keys]), ends([120]))
    chosen = block_lists.select(q, alike, *every, shape, 1.0)
    assert torch.equal(chosen, naive.select(q, alike, keys, shape, 1.0))
    assert chosen[0, -1].tolist() == [0, 1, 2, 3, 29]
    pairs = torch.randn(15, 1, 1, 7).expand(-1, 8, -1, -1).reshape(120, 1, 7)
    chosen = block_lists.select(q, pairs, *every, shape, 1.0)
    inner = chosen[0, -1, 1:4].tolist()  # blocks 2n and 2n + 1 are equal
    assert all(i % 2 == 0 or i - 1 in [0, *inner] for i in inner)


def test_blocks_far_below_the_best_still_have_an_order():
    shape = SparseShape(window=4, stride=4, block=4, top=4, first=0, recent=0)
    entries = torch.tensor([-101.0, -100.0, -99.0, -98.0, -120.0, 0.0, -97.5]).view(-1, 1, 1)
    q = torch.ones(28, 1, 1)
    every = (ends([28]), ends([28]), ends([7]))
    chosen = block_lists.select(q, entries, *every, shape, 1.0)
    assert chosen[0, -1].tolist() == [2, 3, 5, 6]
    assert torch.equal(chosen, naive.select(q, entries, 28, shape, 1.0))


def test_parts_of_a_sequence_and_threads_change_nothing():
    shape = SHAPES[0]
    q, entries, *every = drawn(1, 4, 2, 20, [(400, 400)], shape)
    whole = block_lists.select(q, entries, *every, shape, 0.3)
    known = shape.entries(300)
    early = (ends([300]), ends([300]), ends([known]))
    late = (ends([100]), ends([400]), every[2])
    parts = [
        block_lists.select(q[:300], entries[:known], *early, shape, 0.3),
        block_lists.select(q[300:], entries, *late, shape, 0.3),
    ]
    assert torch.equal(whole, torch.cat(parts, 1))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert torch.equal(whole, block_lists.select(q, entries, *every, shape, 0.3))
    finally:
        torch.set_num_threads(threads)


def test_later_entries_and_numbers_that_are_none_reach_nobody_else():
    shape = SHAPES[0]
    q, entries, *every = drawn(2, 2, 1, 8, [(200, 200)], shape)
    before = block_lists.select(q, entries, *every, shape, 1.0)
    q[90], entries[shape.entries(150) :] = float("nan"), float("inf")
    after = block_lists.select(q, entries, *every, shape, 1.0)
    same = [i for i in range(150) if i != 90]
    assert torch.equal(before[:, same], after[:, same])
    for row in after[0].tolist():
        ids = [i for i in row if i >= 0]
        assert ids == sorted(set(ids))
        assert all(0 <= i < 13 for i in ids)


def test_strides_and_few_tokens():
    shape = SHAPES[0]
    q, entries, *every = drawn(3, 4, 2, 8, [(60, 60), (1, 1), (7, 7)], shape)
    chosen = block_lists.select(q, entries, *every, shape, 1.0)
    turned = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, entries))
    assert torch.equal(chosen, block_lists.select(*turned, *every, shape, 1.0))
    split = (x.repeat_interleave(2, -1)[..., ::2] for x in (q, entries))
    assert torch.equal(chosen, block_lists.select(*split, *every, shape, 1.0))
    assert chosen[:, 60:].tolist() == [[[0, -1, -1]] * 8] * 2
    none = (ends([0]), ends([0]), ends([0]))
    assert block_lists.select(q[:0], entries[:0], *none, shape, 1.0).shape == (2, 0, 3)


def test_ends_that_do_not_fit_read_nothing_outside():
    shape = SHAPES[0]
    q, entries, *_ = drawn(4, 1, 1, 8, [(200, 200)], shape)
    every = (ends([200]), ends([200]), ends([3]))
    chosen = block_lists.select(q, entries[:3].clone(), *every, shape, 1.0)
    assert chosen.max() < 13


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 99),
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 6)),
    st.sampled_from([torch.int32, torch.int64]),
    builds,
)
def test_ids_are_numbered_through_in_order_and_wrong_ones_dropped(seed, size, dtype, build):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-2, 6, size, generator=generator).to(dtype)
    own = torch.randint(0, 5, size[1:2], generator=generator)
    before = torch.randint(0, 50, size[1:2], generator=generator)
    strided = torch.stack([ids, -ids], 2).flatten(1, 2)[:, ::2]
    with patch.object(block_lists, "code", lambda: build):
        numbered = block_lists.number_through(ids, own, before)
        assert torch.equal(numbered, block_lists.number_through(strided, own, before))
        assert block_lists.number_through(ids.repeat(1, 1, 200), own, before) is None
    assert numbered.dtype == torch.int32
    for of_head, rows in zip(ids.tolist(), numbered.tolist(), strict=True):
        every = zip(of_head, rows, own.tolist(), before.tolist(), strict=True)
        for given_ids, row, last, first in every:
            known = sorted({i + first for i in given_ids if 0 <= i <= last})
            assert row == known + [-1] * (len(row) - len(known))


def rows_of(ids, blocks):
    """The queries of each KV head and block, one by one."""
    return [
        [n for n, row in enumerate(of_head.tolist()) for i in row if i == block]
        for of_head in ids
        for block in range(blocks)
    ]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 99),
    st.tuples(st.integers(1, 4), st.integers(1, 70), st.integers(1, 5)),
    st.integers(1, 9),
    st.integers(1, 2),
    builds,
)
def test_inverted_lists_have_every_choice_once_in_the_order_of_queries(
    seed, size, blocks, threads, build
):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-2, blocks + 1, size, generator=generator).int()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with patch.object(block_lists, "code", lambda: build):
            rows, query, place = block_lists.invert(ids, blocks)
            strided = torch.stack([ids, -ids], 2).flatten(1, 2)[:, ::2]
            again = block_lists.invert(strided, blocks)
    finally:
        torch.set_num_threads(before)
    expected = rows_of(ids, blocks)
    assert [query[a:b].tolist() for a, b in pairwise(rows.tolist())] == expected
    there = (ids >= 0) & (ids < blocks)
    assert torch.equal(place >= 0, there)
    assert sorted(place[there].tolist()) == list(range(int(there.sum())))
    kv_head, number, _ = there.nonzero(as_tuple=True)
    assert torch.equal(query[place[there].long()].long(), number)
    row = torch.searchsorted(rows, place[there].long(), right=True) - 1
    assert torch.equal(row, kv_head * blocks + ids[there])
    assert not query[int(rows[-1]) :].any()
    assert all(map(torch.equal, again, (rows, query, place)))


def test_tables_and_choices_are_the_same_without_compiled_code():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, 7, (3, 50, 4), generator=generator).int()
    shape = SHAPES[0]
    q, entries, *every = drawn(6, 4, 2, 8, [(90, 90), (5, 40)], shape)
    ours = tables.block_major(ids, 7), select_blocks(q, entries, *every, shape)
    with patch.object(block_lists, "code", lambda: None):
        assert block_lists.invert(ids, 7) is None
        theirs = tables.block_major(ids, 7), select_blocks(q, entries, *every, shape)
    assert torch.equal(ours[0].rows, theirs[0].rows)
    assert torch.equal(ours[0].place, theirs[0].place)
    known = int(ours[0].rows[-1])
    assert torch.equal(ours[0].query[:known], theirs[0].query[:known])
    assert torch.equal(ours[1], theirs[1])


def test_what_compiled_code_does_not_know_is_left_to_torch():
    shape = SHAPES[0]
    q, entries, *every = drawn(5, 1, 1, 8, [(20, 20)], shape)
    assert block_lists.select(q.double(), entries.double(), *every, shape, 1.0) is None
    assert block_lists.invert(torch.zeros(1, 1, 1, dtype=torch.int64), 1) is None


def test_code_that_does_not_load_or_is_of_another_source_is_told(tmp_path, caplog):
    assert compiled.library("nothing", (), "lists are made", tmp_path) is None
    assert "lists are made by plain torch" in caplog.messages[-1]
    (tmp_path / f"broken_avx2{EXTENSION_SUFFIXES[0]}").write_text("no code")
    assert compiled.library("broken", (), "lists are made", tmp_path) is None
    assert "broken_avx2" in caplog.messages[-1]
    assert compiled.library("block_lists", (("trimtab_selection_bytes", 1),), "lists") is None
    assert "built from another source" in caplog.messages[-1]
