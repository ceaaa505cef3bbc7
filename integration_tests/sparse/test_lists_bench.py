"""What `trimtab bench sparse` holds lists of blocks, and attention to them, against."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from trimtab.kernels.sparse import SparseShape, naive, tables
from trimtab.sparse import bench, flex_rival, lists_bench

pytestmark = pytest.mark.integration

SMALL = SparseShape(window=8, stride=4, block=16, top=3, first=1, recent=1)


def test_the_published_tables_hold_the_lists_that_ours_do():
    ids = torch.cat([lists_bench.some_lists(500, SMALL) for _ in range(2)])
    ours = tables.block_major(ids, 32)
    bounds = list(pairwise(ours.rows.tolist()))
    published = lists_bench.published_tables(ids, 32)
    for head, (lists, lengths, begins, _) in enumerate(published):
        own = bounds[32 * head : 32 * head + 32]
        assert lengths.tolist() == [b - a for a, b in own]
        for (a, b), begin in zip(own, begins.tolist(), strict=True):
            assert ours.query[a:b].tolist() == lists[begin : begin + b - a].tolist()
    place_of = published[-1][-1]  # made once, and so the last head's
    query, slot = (ids[1] >= 0).nonzero(as_tuple=True)
    block = ids[1, query, slot]
    starts = ours.rows[32 + block]
    assert torch.equal(place_of[block, query].long(), ours.place[1, query, slot].long() - starts)


def test_random_lists_are_such_as_a_choice_makes():
    ids = lists_bench.some_lists(300, SMALL)[0]
    for token, row in enumerate(ids.tolist()):
        own = token // SMALL.block
        known = [i for i in row if i >= 0]
        assert row == sorted(set(known)) + [-1] * (SMALL.top - len(known))
        assert len(known) == min(SMALL.top, own + 1)
        assert all(0 <= i <= own for i in known)
    assert (ids == 9).any()
    assert (ids == 0).any()


@pytest.mark.parametrize("shape", [SMALL, SparseShape(4, 4, 16, top=9, first=2, recent=3)])
@pytest.mark.parametrize("queries", [200, 37])
def test_all_scores_choose_the_naive_blocks(shape, queries):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(queries, 4, 8, generator=generator)
    entries = naive.mean_compress(torch.randn(200, 2, 8, generator=generator), shape)
    expected = naive.select(q, entries, 200, shape, 8**-0.5)
    assert torch.equal(lists_bench.materialised(q, entries, 200, shape), expected)


def test_peak_memory_is_what_a_call_adds_and_not_what_was_there():
    kept = torch.ones(16 * 2**20)
    more = lists_bench.peak_bytes(lambda: torch.ones(8 * 2**20).sum())
    assert 31 * 2**20 < more < 60 * 2**20
    assert lists_bench.peak_bytes(lambda: kept.sum()) < 8 * 2**20


def test_choosing_takes_memory_for_what_it_returns_and_not_for_scores():
    q, keys = torch.randn(8192, 4, 16), torch.randn(8192, 1, 16)
    shape = SparseShape()
    entries = naive.mean_compress(keys, shape)
    ends, entry_ends = (torch.tensor([0, n], dtype=torch.int32) for n in (8192, len(entries)))
    score_bytes = 4 * 4 * 8192 * len(entries)

    def choose():
        return lists_bench.select_blocks(q, entries, ends, ends, entry_ends, shape)

    choose()
    peak = lists_bench.peak_bytes(choose)
    assert peak < score_bytes / 8


def test_every_case_tells_time_and_memory_against_each_rival():
    cases = [*lists_bench.table_cases(1024, 1), *lists_bench.choice_cases(512, 4, 1)]
    found = {(c.case, c.metric, c.baseline.split(" ")[0]) for c in cases}
    assert found == {
        ("model/tables/1024", "memory", "what"),
        ("real/tables/1024", "time", "the"),
        ("real/tables/1024", "peak_memory", "the"),
        *(
            ("real/choice/512/group-4", metric, first)
            for metric in ("time", "peak_memory")
            for first in ("all", "scores")
        ),
    }
    assert cases[0].baseline_value == 16 * 1024 * 16


def test_flex_attention_is_given_the_same_blocks(monkeypatch):
    monkeypatch.setattr(bench, "KEPT_BLOCKS", 3)
    mask, density = bench.random_choice(7)
    assert 0.5 < density < 1
    lists = flex_rival.flex_lists(mask)
    assert torch.equal(lists.to_dense()[0].bool(), mask)
    assert lists.kv_num_blocks.eq(1).all()  # the own block alone is causal inside
    assert lists.seq_lengths == (7 * 64, 7 * 64)
