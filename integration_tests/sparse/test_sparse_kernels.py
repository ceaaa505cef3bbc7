"""The operators of sparse attention against the mathematics in plain torch."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.kernels.sparse import (
    WORKSPACE_BYTES,
    SparseShape,
    blockwise,
    branches,
    compressed_attention,
    gpu_tiles,
    launch,
    launch_tables,
    naive,
    operators,
    published,
    select_blocks,
    selected_attention,
    tables,
    triton_near,
    triton_select,
    triton_selected,
    triton_spans,
    triton_tables,
)
from trimtab.kernels.sparse.chosen import Chosen
from trimtab.kernels.sparse.gpu_tiles import Need, Tile
from trimtab.kernels.sparse.selected_plan import (
    DENSE_FLOP_PER_S,
    L2_BYTES_PER_S,
    PARTS_BYTES_PER_S,
    plan_selected,
)
from trimtab.sparse import performance_model, traffic
from trimtab.sparse.published_figures import Run

pytestmark = pytest.mark.integration

SMALL = SparseShape(window=8, stride=4, block=16, top=3, first=1, recent=1, sliding=24)


def ends(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def drawn(seed, heads, kv_heads, d, d_v, lengths, dtype=torch.float32):
    """Queries, keys and values of sequences that have ``(queries, keys)`` tokens."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    queries, keys = ([a for a, _ in lengths], [b for _, b in lengths])
    parts = (
        some(sum(queries), heads, d),
        some(sum(keys), kv_heads, d),
        some(sum(keys), kv_heads, d_v),
    )
    return *parts, ends(queries), ends(keys)


def by_sequence(q, k, v, cu_q, cu_k, indices, block):
    """`naive.selected` of each sequence, packed."""
    outs = [
        naive.selected(q[a:b], k[c:d], v[c:d], indices[:, a:b], block, q.shape[-1] ** -0.5)
        for (a, b), (c, d) in zip(pairwise(cu_q), pairwise(cu_k), strict=True)
    ]
    return torch.cat([o for o, _ in outs]), torch.cat([s for _, s in outs])


def some_blocks(seed, kv_heads, queries, top, most=6):
    """Ids in any order, with repeats, absent, negative and future ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, most, (kv_heads, queries, top), generator=generator).int()


lengths = st.lists(
    st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n))),
    min_size=1,
    max_size=3,
)
heads = st.sampled_from([(1, 1), (3, 1), (4, 4), (10, 2), (14, 2)])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), heads, st.sampled_from([(8, 8), (12, 20)]), lengths, st.booleans())
def test_selected_attention_is_the_naive_one_with_its_gradients(
    seed, head_counts, sizes, spans, as_published
):
    *qkv, cu_q, cu_k = drawn(seed, *head_counts, *sizes, spans, torch.float64)
    indices = some_blocks(seed, head_counts[1], qkv[0].shape[0], 4)
    ours = [x.clone().requires_grad_() for x in qkv]
    theirs = [x.clone().requires_grad_() for x in qkv]
    out, lse = selected_attention(*ours, indices, cu_q, cu_k, block=16, as_published=as_published)
    expected, expected_lse = by_sequence(*theirs, cu_q, cu_k, indices, 16)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    out.sin().sum().backward()
    expected.sin().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), heads, lengths)
def test_selection_is_the_naive_one_whether_packed_or_alone(seed, head_counts, spans):
    q, k, _, cu_q, cu_k = drawn(seed, *head_counts, 8, 8, spans, torch.float64)
    entries = [naive.mean_compress(x, SMALL) for x in k.split([b for _, b in spans])]
    chosen = select_blocks(
        q, torch.cat(entries), cu_q, cu_k, ends([len(e) for e in entries]), SMALL
    )
    parts = zip(q.split([a for a, _ in spans]), entries, spans, strict=True)
    alone = [naive.select(part, e, keys, SMALL, 8**-0.5) for part, e, (_, keys) in parts]
    assert torch.equal(chosen, torch.cat(alone, 1))


def test_the_weights_count_how_often_an_entry_overlaps_a_block():
    assert SparseShape().weights == (1, 2, 2, 2, 1)
    p = torch.zeros(1, 1, 16)
    p[..., 7] = 1.0  # the entry of tokens 112 to 143 lies on the border of blocks 1 and 2
    scores = naive.importance(p, 256, 1, SparseShape())
    assert scores.flatten().tolist() == [0, 1, 1, 0]


def test_equal_scores_go_to_the_lower_block_and_forced_ones_stay():
    scores = torch.zeros(1, 160, 10)
    chosen = naive.top_blocks(scores, 160, SMALL)
    assert chosen[0, -1].tolist() == [0, 1, 9]
    assert chosen[0, 0].tolist() == [0, -1, -1]


def test_a_sequence_below_the_window_chooses_what_is_forced_and_has_no_compressed_part():
    q, k, _, *_ = drawn(0, 2, 1, 8, 8, [(7, 7)])
    entries = naive.mean_compress(k, SMALL)
    assert entries.shape == (0, 1, 8)
    out, lse, _ = naive.compressed(q, entries, entries, 7, SMALL, 1.0)
    assert torch.equal(out, torch.zeros(7, 2, 8))
    assert torch.isneginf(lse).all()
    assert naive.select(q, entries, 7, SMALL, 1.0)[0, -1].tolist() == [0, -1, -1]


def test_native_sparse_attention_that_covers_everything_is_dense_attention():
    q, k, v, *_ = drawn(1, 4, 2, 8, 8, [(50, 50)], torch.float64)
    shape = SparseShape(8, 4, 16, top=4, first=1, recent=1, sliding=50)
    entries = naive.mean_compress(k, shape)
    for branch in (1, 2):
        gates = torch.eye(3, dtype=torch.float64)[branch].expand(50, 1, 3)
        mixed = naive.native_sparse_attention(q, k, v, entries, entries, gates, shape, 8**-0.5)
        dense = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in (q, k, v)), is_causal=True, enable_gqa=True
        ).transpose(0, 1)
        torch.testing.assert_close(mixed, dense)


def test_native_sparse_attention_has_the_gradients_of_its_branches():
    q, k, v, *_ = drawn(2, 2, 1, 4, 4, [(20, 20)], torch.float64)
    weight = torch.randn(1, 32, 4, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, weight, torch.rand(20, 2, 3).double())]

    def attend(q, k, v, weight, gates):
        position = torch.zeros(8, 4, dtype=torch.float64)
        entries = naive.linear_compress(k, weight, position, SMALL)
        return naive.native_sparse_attention(q, k, v, entries, entries, gates, SMALL, 0.5)

    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)


def test_the_order_of_slots_and_repeats_change_nothing():
    q, k, v, cu_q, cu_k = drawn(3, 4, 2, 8, 8, [(60, 60)])
    indices = some_blocks(3, 2, 60, 5)
    turned = torch.cat([indices.flip(-1), indices], -1)
    results = [selected_attention(q, k, v, i, cu_q, cu_k, block=16)[0] for i in (indices, turned)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("as_published", [False, True])
def test_a_later_token_changes_no_earlier_output_nor_selection(as_published):
    q, k, v, cu_q, cu_k = drawn(4, 4, 2, 8, 8, [(64, 64)])
    shape = SparseShape(8, 4, 16, top=2, first=1, recent=1)

    def both(k, v):
        entries = naive.mean_compress(k, shape)
        chosen = select_blocks(q, entries, cu_q, cu_k, ends([len(entries)]), shape)
        out, _ = selected_attention(
            q, k, v, chosen, cu_q, cu_k, block=16, as_published=as_published
        )
        return chosen, out

    chosen, out = both(k, v)
    k2, v2 = k.clone(), v.clone()
    k2[40:] += 5
    v2[40:] = float("nan")
    chosen2, out2 = both(k2, v2)
    assert torch.equal(chosen[:, :40], chosen2[:, :40])
    assert torch.equal(out[:40], out2[:40])
    assert out2[40:].isnan().any()


def test_what_lies_in_a_block_nobody_chose_does_not_leak_nor_get_a_gradient():
    q, k, v, cu_q, cu_k = drawn(5, 2, 2, 8, 8, [(64, 64)])
    indices = torch.tensor([0, 3]).int().expand(2, 64, 2)
    k[16:32], v[16:32] = float("inf"), float("nan")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, _ = selected_attention(*leaves, indices, cu_q, cu_k, block=16)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(x.grad.isfinite().all() for x in leaves)
    assert not leaves[1].grad[16:48].any()
    assert not leaves[2].grad[16:48].any()


@pytest.mark.parametrize("as_published", [False, True])
def test_logits_of_ten_thousand_in_half_precision_stay_finite(as_published):
    q, k, v, cu_q, cu_k = drawn(6, 2, 1, 8, 8, [(64, 64)], torch.float16)
    indices = some_blocks(6, 1, 64, 4).clamp(min=0)
    indices[..., 0] = torch.arange(64) // 16
    out, lse = selected_attention(
        *(q * 60, k * 60, v, indices, cu_q, cu_k), block=16, as_published=as_published
    )
    expected = naive.selected(*(x.double() for x in (q * 60, k * 60, v)), indices, 16, 8**-0.5)[0]
    assert lse.abs().max() > 5000
    torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=0)


def test_queries_that_choose_nothing_get_zero():
    q, k, v, cu_q, cu_k = drawn(7, 2, 1, 8, 8, [(5, 20)])
    for nothing in (torch.full((1, 5, 2), -1).int(), torch.full((1, 5, 2), 7).int()):
        out, lse = selected_attention(q, k, v, nothing, cu_q, cu_k, block=16)
        assert not out.any()
        assert torch.isneginf(lse).all()


def test_the_index_tables_hold_every_choice_once():
    *_, cu_q, cu_k = drawn(8, 2, 2, 8, 8, [(30, 50), (10, 10), (0, 0)])
    queries = tables.place_queries(cu_q, cu_k, 40, 16)
    blocks = tables.cut(cu_k, 60, 16)
    ids = tables.number_through(some_blocks(8, 2, 40, 4), queries, blocks)
    table = tables.block_major(ids, blocks.first.numel())
    assert (table.rows.diff() >= 0).all()
    assert table.rows[-1] == (ids >= 0).sum()
    kept = table.place[ids >= 0]
    assert kept.sort().values.tolist() == list(range(len(kept)))
    head, query, _ = (ids >= 0).nonzero().T
    assert torch.equal(table.query[kept].long(), query)
    rows = torch.searchsorted(table.rows, kept, right=True) - 1
    assert torch.equal(rows, head * blocks.first.numel() + ids[ids >= 0])


def test_items_cover_a_row_that_everybody_chose():
    ids = torch.zeros(1, 1000, 1, dtype=torch.int64)
    table = tables.block_major(ids, 8)
    items = tables.schedule(table, group=3, rows_per_item=64)
    assert items.row.tolist()[:47] == [0] * 47
    assert items.chunk.tolist()[:47] == list(range(47))
    assert (items.row[47:] == -1).all()


@given(
    st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=1), st.integers(1, 9)
)
def test_work_items_cover_every_row_once_and_the_longest_come_first(lengths, size):
    most = max(sum(row) for row in lengths)
    work = tables.work(torch.tensor(lengths), 1, most, size)
    for number, segment in enumerate(lengths):
        items = zip(work.row[number].tolist(), work.chunk[number].tolist(), strict=True)
        known = [(row, chunk) for row, chunk in items if row >= 0]
        expected = [(r, c) for r, n in enumerate(segment) for c in range(-(-n // size))]
        assert sorted(known) == expected
        assert (work.row[number, len(known) :] == -1).all()
        left = [min(size, segment[row] - chunk * size) for row, chunk in known]
        assert left == sorted(left, reverse=True)
        beyond = [max(0, -(-n // size) - 1) for n in segment]
        assert work.further[number].diff().tolist() == beyond
        assert sum(beyond) <= most // size


@given(
    st.sampled_from([(1, 1), (6, 3), (7, 7), (10, 5)]),
    st.integers(1, 40),
    st.integers(0, 20_000),
    st.booleans(),
    st.integers(0, 40),
)
def test_lots_cover_every_query_and_kv_head_once_within_the_workspace(
    head_counts, queries, workspace_bytes, shared, idle
):
    *qkv, cu_q, cu_k = drawn(14, *head_counts, 8, 8, [(queries, queries)])
    indices = some_blocks(14, head_counts[1], queries, 3)
    indices[:, :idle] = -1
    busy = max(0, queries - idle)
    chosen = chosen_of(qkv, cu_q, cu_k, indices, workspace_bytes=workspace_bytes)
    seen = torch.zeros(head_counts[1], queries, dtype=torch.int64)
    found = list(launch.segments(chosen, Tile(16, 4, 1), 24, shared=shared, busy=busy))
    for of in found:
        seen[of.kv, of.part] += 1
        assert of.heads == slice(of.kv.start * chosen.group, of.kv.stop * chosen.group)
        taken = of.entries * chosen.group * 24
        assert taken <= workspace_bytes or of.entries == chosen.top
        slots = (of.kv.stop - of.kv.start) * (of.part.stop - of.part.start) * chosen.top
        assert not shared or slots * 24 <= workspace_bytes or slots == chosen.top
        assert of.table.rows[-1] - of.table.rows[0] <= of.entries
        rows = of.table.rows - of.table.rows[0]
        ids = chosen.ids[of.kv, of.part]
        assert rows[-1] == (ids >= 0).sum()
        for at, kv_head in enumerate(ids):
            for number in range(chosen.blocks.first.numel()):
                row = at * chosen.blocks.first.numel() + number
                listed = of.table.query[of.table.rows[row] : of.table.rows[row + 1]]
                assert listed.tolist() == (kv_head == number).any(-1).nonzero().flatten().tolist()
    assert (seen == 1).all()


def test_segments_have_as_many_queries_of_a_kv_head_as_fit():
    *qkv, cu_q, cu_k = drawn(15, 6, 3, 8, 8, [(40, 40)])
    room = 2 * 40 * 4 * 24
    chosen = chosen_of(qkv, cu_q, cu_k, some_blocks(15, 3, 40, 4), workspace_bytes=room)
    parts = [(of.kv, of.part) for of in launch.segments(chosen, Tile(16, 4, 1), 24)]
    assert parts == [(slice(n, n + 1), slice(0, 40)) for n in range(3)]
    chosen = replace(chosen, workspace_bytes=2 * room)
    parts = [(of.kv, of.part) for of in launch.segments(chosen, Tile(16, 4, 1), 24)]
    assert parts == [(slice(0, 2), slice(0, 40)), (slice(2, 3), slice(0, 40))]


def chosen_of(qkv, cu_q, cu_k, indices, block=16, workspace_bytes=1 << 24):
    queries = tables.place_queries(cu_q, cu_k, qkv[0].shape[0], block)
    blocks = tables.cut(cu_k, qkv[1].shape[0], block)
    ids = tables.number_through(indices, queries, blocks)
    return Chosen(*qkv, ids, block, 0.3, queries, blocks, workspace_bytes)


@pytest.mark.parametrize("way", [blockwise, published])
def test_a_small_workspace_changes_nothing(way):
    *qkv, cu_q, cu_k = drawn(9, 4, 2, 8, 8, [(60, 60)], torch.float64)
    indices = some_blocks(9, 2, 60, 4)
    whole, parts = (
        way.forward(chosen_of(qkv, cu_q, cu_k, indices, workspace_bytes=most))
        for most in (1 << 24, 64)
    )
    torch.testing.assert_close(whole, parts)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), lengths)
def test_blocks_in_halves_are_the_same_attention_with_the_same_gradients(seed, spans):
    *qkv, cu_q, cu_k = drawn(seed, 4, 2, 8, 8, spans, torch.float64)
    whole = chosen_of(qkv, cu_q, cu_k, some_blocks(seed, 2, qkv[0].shape[0], 3, most=3), block=32)
    halves = whole.halved()
    assert halves.block == 16
    assert halves.blocks.length.max() <= 16
    results = [blockwise.forward(x) for x in (whole, halves)]
    torch.testing.assert_close(*results)
    gradient = results[0][0].sin()
    torch.testing.assert_close(
        *(blockwise.backward(gradient, *results[0], x) for x in (whole, halves))
    )


def test_the_operators_keep_torchs_rules():
    q, k, v, cu_q, cu_k = drawn(10, 4, 2, 8, 8, [(40, 40)])
    indices = some_blocks(10, 2, 40, 3)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    operators = torch.ops.trimtab_sparse
    torch.library.opcheck(
        operators.selected, (*leaves, indices, cu_q, cu_k, 16, 0.3, 1 << 20, False)
    )
    entries = naive.mean_compress(k.detach(), SMALL)
    sizes = [8, 4, 16, 3, 1, 1]
    for lse in (None, torch.zeros(10, 4)):
        arguments = (q.detach(), entries, cu_q, cu_k, ends([len(entries)]), sizes, 0.3, lse)
        torch.library.opcheck(operators.select, arguments)


def test_a_sum_of_other_queries_is_refused():
    q, k, _, cu_q, cu_k = drawn(10, 4, 2, 8, 8, [(40, 40)])
    entries = naive.mean_compress(k, SMALL)
    with pytest.raises(ValueError, match=r"lse is \(39, 4\); it must be \[queries, heads\]"):
        select_blocks(q, entries, cu_q, cu_k, ends([len(entries)]), SMALL, lse=torch.ones(39, 4))


def test_selection_and_attention_compile_into_one_graph_with_equal_gradients():
    q, k, v, cu_q, cu_k = drawn(11, 4, 2, 8, 8, [(48, 48)])
    cu_entries = ends([SMALL.entries(48)])

    def attend(q, k, v):
        entries = k.unfold(0, SMALL.window, SMALL.stride).mean(-1)
        chosen = select_blocks(q, entries, cu_q, cu_k, cu_entries, SMALL)
        return selected_attention(q, k, v, chosen, cu_q, cu_k, block=16)[0].square().sum()

    gradients = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        function(*leaves).backward()
        gradients.append([x.grad for x in leaves])
    torch.testing.assert_close(*gradients)


def test_checkpointing_chooses_the_same_blocks_again():
    q, k, v, cu_q, cu_k = drawn(12, 4, 2, 8, 8, [(64, 64)])
    seen = []

    def attend(q, k, v):
        entries = naive.mean_compress(k, SMALL)
        chosen = select_blocks(q, entries, cu_q, cu_k, ends([len(entries)]), SMALL)
        seen.append(chosen)
        return selected_attention(q, k, v, chosen, cu_q, cu_k, block=16)[0]

    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.utils.checkpoint.checkpoint(attend, *leaves, use_reentrant=False).sum().backward()
    assert len(seen) == 2
    assert torch.equal(*seen)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda a: a.update(k=a["k"][:, :0]), "KV heads"),
        (lambda a: a.update(v=a["v"][:-1]), "do not fit"),
        (lambda a: a.update(k=a["k"].half()), "dtype"),
        (lambda a: a.update(indices=a["indices"][:, :-1]), "indices is"),
        (lambda a: a.update(block=24), "power of two"),
        (lambda a: a.update(cu_keys=ends([10, 10])), "different numbers"),
        (lambda a: a.update(indices=a["indices"] + 0.5), "indices is torch.float32"),
        (lambda a: a.update(workspace_bytes=-5), "workspace_bytes is -5"),
        (lambda a: a.update(cu_queries=ends([10])), "must end at the 20 queries"),
        (lambda a: a.update(cu_keys=ends([21])), "there are 20 keys"),
        (
            lambda a: a.update(k=a["k"][:9], v=a["v"][:9], cu_keys=ends([9])),
            "20 queries and 9 keys",
        ),
        (lambda a: a.update(cu_keys=torch.tensor([5, 20])), "cu_keys begins at 5"),
        (lambda a: a.update(cu_queries=ends([15, -5, 10]), cu_keys=ends([20, 0, 0])), "decreases"),
        (lambda a: a.update(cu_keys=ends([20]).float()), "whole numbers"),
        (lambda a: a.update(cu_keys=ends([20])[:0]), "whole numbers"),
    ],
)
def test_sizes_that_do_not_fit_are_named(change, what):
    q, k, v, cu_q, cu_k = drawn(13, 4, 2, 8, 8, [(20, 20)])
    arguments = {"q": q, "k": k, "v": v, "indices": some_blocks(13, 2, 20, 3), "block": 16}
    arguments |= {"cu_queries": cu_q, "cu_keys": cu_k}
    change(arguments)
    with pytest.raises(ValueError, match=what):
        selected_attention(**arguments)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda a: a.update(q=a["q"][:, :3]), "KV heads"),
        (lambda a: a.update(q=a["q"][..., :4]), "do not fit"),
        (lambda a: a.update(cu_keys=ends([20, 20])), "different numbers"),
        (lambda a: a.update(cu_queries=ends([30])), "must end at the 40 queries"),
        (lambda a: a.update(cu_entries=ends([10])), "there are 9 entries"),
        (lambda a: a.update(cu_entries=ends([2])), "2 entries; its 40 keys make 9"),
        (lambda a: a.update(cu_entries=torch.tensor([1, 9])), "cu_entries begins at 1"),
        (lambda a: a.update(cu_entries=ends([5, 4])), "cu_entries and cu_keys name different"),
    ],
)
def test_a_choice_among_entries_that_do_not_fit_is_refused(change, what):
    q, k, _, cu_q, cu_k = drawn(16, 4, 2, 8, 8, [(40, 40)])
    arguments = {"q": q, "entries": naive.mean_compress(k, SMALL), "shape": SMALL}
    arguments |= {"cu_queries": cu_q, "cu_keys": cu_k, "cu_entries": ends([9])}
    select_blocks(**arguments)
    change(arguments)
    with pytest.raises(ValueError, match=what):
        select_blocks(**arguments)


@pytest.mark.parametrize(
    ("sizes", "what"),
    [
        ({"stride": 12}, "stride 12 must divide"),
        ({"top": 2}, "more than top, 2"),
        ({"window": 128}, "longer than the block 64"),
        ({"block": 0}, "block is 0"),
    ],
)
def test_shapes_that_cannot_be_are_refused(sizes, what):
    with pytest.raises(ValueError, match=what):
        SparseShape(**sizes)


def counted_lists(segments):
    """What `traffic.Lists` tells of segments, but their number."""
    further = torch.cat([of.further.diff() for of in segments])
    return {
        "launched": sum(of.item_row.numel() for of in segments),
        "items": sum(int((of.item_row >= 0).sum()) for of in segments),
        "further": int(further.sum()),
        "cut": int((further > 0).sum()),
        "rows": further.numel(),
    }


@pytest.mark.parametrize("near_until", [None, 0, 1024])
def test_the_model_of_times_expects_the_tables_that_chance_makes(near_until):
    tokens, kv_heads, top, block = 4096, 4, 16, 64
    generator = torch.Generator().manual_seed(17)
    own = torch.arange(tokens)[:, None] // block
    ids = torch.arange(tokens // block)
    scores = torch.rand(kv_heads, tokens, tokens // block, generator=generator)
    scores = scores.masked_fill((ids == 0) | (ids > own - 2), 2).masked_fill(ids > own, -1)
    kept = scores.topk(top)
    indices = kept.indices.masked_fill(kept.values < 0, -1).int()
    _, *kv, cu, _ = drawn(17, kv_heads, kv_heads, 8, 8, [(tokens, tokens)])
    q = torch.zeros(tokens, 2 * kv_heads, 8)
    for room, part_bytes in ((1 << 22, 24), (1 << 25, 24), (1 << 25, 1)):
        chosen = chosen_of([q, *kv], cu, cu, indices, block, room)
        if near_until is not None:
            near = chosen.ids - own[None] + 1 >= 0
            near |= (chosen.ids == 0) | (torch.arange(tokens)[:, None] < near_until)
            chosen = replace(chosen, ids=chosen.ids.masked_fill(near, -1))
        of = traffic.Sizes(tokens, kv_heads, 2, 8, 8, block, top, 2, room, near_until=near_until)
        expected = traffic.lists(of, part_bytes, 512)
        of_late = {"shared": True, "busy": tokens - (near_until or 0)}
        found = list(launch.segments(chosen, Tile(64, 4, 2), part_bytes, **of_late))
        assert expected.choices == (chosen.ids >= 0).sum()
        assert expected.segments == len(found)
        assert expected.lots == len(list(chosen.lots(part_bytes, **of_late)))
        for name, real in counted_lists(found).items():
            assert getattr(expected, name) == pytest.approx(real, rel=0.05), name


def test_where_segments_begin_asks_for_no_kernels_of_their_own():
    of_parts = ("forward", "merge", "backward", "add_chunks", "sum_parts")
    kernels = [(triton_selected, name) for name in of_parts] + [(triton_near, "near_and_join")]
    for module, name in kernels:
        kernel = getattr(module, name)
        free = {p.name for p in kernel.params if p.do_not_specialize_on_alignment}
        assert free == set(module.ANYWHERE) & set(kernel.arg_names)


def test_large_groups_go_by_queries_and_the_plan_says_why():
    paths = {g: plan_selected(g, 128, 128, 64, 2) for g in (1, 4, 8, 16, 32, 64)}
    assert {g: plan.path for g, plan in paths.items()} == {
        **dict.fromkeys((1, 4, 8, 64), "blocks"),
        **dict.fromkeys((16, 32), "queries"),
    }
    assert "16 heads share the keys" in paths[16].explain()
    assert "for 4 heads only" in paths[4].explain()
    assert "larger than a tile of 32" in paths[64].explain()


def test_the_plan_chooses_as_the_model_of_times_predicts():
    known = performance_model.model("h200")
    rows = 64 * 128 * 1024 * 16
    parts_bytes = performance_model._PUBLISHED_PART_BYTES * rows
    assert pytest.approx(parts_bytes / known.seconds["parts"], rel=0.02) == PARTS_BYTES_PER_S
    dense_flop = 4 * 128 * 64 * (128 * 1024) ** 2 / 2
    assert pytest.approx(dense_flop / known.dense.forward, rel=0.02) == DENSE_FLOP_PER_S[2]
    assert performance_model.GPUS["h200"].l2_bytes_per_s == L2_BYTES_PER_S
    assert traffic.Sizes(1, 1, 1, 1, 1, 1, 1).workspace_bytes == WORKSPACE_BYTES
    for group in (1, 2, 4, 8, 16, 32, 64):
        for block in (64, 128):
            run = Run("h20", 8 * 1024, group, block, 1024 // block)
            path = plan_selected(group, 128, 128, block, 2).path
            assert (path == "queries") == performance_model.goes_by_queries(run)
        for tokens in (8 * 1024, 128 * 1024):
            predicted = known.our_selected_s(Run("h200", tokens, group, 64, 16))
            path = plan_selected(group, 128, 128, 64, 2).path
            assert group > 32 or path == min(predicted, key=predicted.get)


def test_the_model_of_times_knows_how_our_kernels_are_launched(monkeypatch):
    need = Need("cuda", 256, 2)
    assert gpu_tiles.tile("forward", need, 64).chunk == performance_model.FORWARD_CHUNK
    assert gpu_tiles.tile("forward", need, 128).chunk == performance_model.FORWARD_CHUNK
    for block, until in performance_model.NEAR_UNTIL.items():
        for group in (1, 4, 64):
            plan = plan_selected(group, 128, 128, block, 2)
            assert plan.dense_until(1024 // block, block) == until
    assert gpu_tiles.tile("near", need).rows == performance_model.NEAR_ROWS
    assert gpu_tiles.fit_block("backward", need, 128) == performance_model.BACKWARD_BLOCK
    assert gpu_tiles.tile("backward", need, 64).chunk == performance_model.BACKWARD_CHUNK
    for top, blocks in ((16, 128), (16, 2048), (8, 64), (3, 1)):
        assert traffic.count_tile(top, blocks) == launch_tables.tile_of(top, blocks)
    *qkv, cu, _ = drawn(18, 4, 2, 8, 8, [(60, 60)])
    indices, started = some_blocks(18, 2, 60, 4), []
    for name in ("place", "cut", "number", "count", "begin", "scatter", "items"):
        monkeypatch.setattr(triton_tables, name, Started(started))
    monkeypatch.setattr(triton_near, "far", Started(started))
    monkeypatch.setattr(launch_tables, "_on_triton", lambda x: True)  # as on a GPU
    with Calls() as calls:
        chosen = operators._chosen(*qkv, indices, cu, cu, 16, 0.3, 1 << 24)
        launch.Near.of(chosen).far_ids()
    assert len(started) + calls.count == performance_model.CALL_LAUNCHES
    for where, name in ((triton_tables, "spans"), (triton_spans, "forward")):
        monkeypatch.setattr(where, name, Started(started))
    monkeypatch.setattr(triton_select, "best_blocks", Started(started))
    for module in (branches, operators):
        monkeypatch.setattr(module, "on_triton", lambda x: True)
    entries, lse, launches = torch.randn(15, 2, 8), torch.zeros(60, 4), []
    for work in (
        lambda *every: compressed_attention(qkv[0], entries, entries, *every),
        lambda *every: operators._select._init_fn(
            *(qkv[0], entries, *every[:3], [8, 4, 16, 3, 1, 1], 0.3, lse)
        ),
    ):
        started.clear()
        every = ends([60]), ends([60]), ends([60 // 4]), SMALL
        with Calls() as calls:
            work(*every)
        launches.append(len(started) + calls.count)
    known = performance_model.COMPRESSED_LAUNCHES, performance_model.CHOICE_LAUNCHES
    assert tuple(launches) == known
    started.clear()
    with Calls() as calls:
        assert len(list(launch.segments(chosen, Tile(16, 4, 1), 24, shared=True))) == 1
    sums = 2  # kernels of torch's
    assert (len(started), calls.count) == (performance_model.TABLE_LAUNCHES - sums, 1)


class Started:
    """Stands for a kernel, and notes its launches."""

    def __init__(self, launches):
        self.launches = launches

    def __getitem__(self, grid):
        def start(*given, **constants):
            self.launches.append(grid)
            for tensor in given:
                if isinstance(tensor, torch.Tensor) and not tensor.is_floating_point():
                    tensor.numpy().fill(0)  # places in others

        return start


class Calls(TorchDispatchMode):
    """Counts torch's calls that start a kernel."""

    count = 0
    starts_none = frozenset(
        ("view", "slice", "select", "unsqueeze", "expand", "alias", "as_strided", "permute")
        + ("transpose", "detach", "_unsafe_view", "empty", "new_empty", "empty_like", "unbind")
        + ("span",)  # what it starts is noted
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.__name__.split(".")[0] not in self.starts_none
        return function(*args, **(kwargs or {}))


def test_traffic_is_what_the_kernels_load_and_store():
    script = Path(__file__).with_name("counted_traffic.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script], env=environment, check=True, timeout=300)


@pytest.mark.parametrize("script", ["interpreted_kernels.py", "interpreted_near.py"])
def test_the_gpu_kernels_agree_with_the_mathematics_interpreted_where_there_is_no_gpu(script):
    how = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    environment = {**os.environ, **how, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, Path(__file__).with_name(script)], env=environment, check=True, timeout=300
    )
