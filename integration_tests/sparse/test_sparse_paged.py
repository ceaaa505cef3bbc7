"""Sparse attention over pages, against the same over packed sequences and against a slow twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.kernels.sparse import (
    NewTokens,
    Paging,
    SparseShape,
    Windows,
    naive,
    paged,
    paged_compressed_attention,
    paged_native_sparse_attention,
    paged_select_blocks,
    paged_selected_attention,
    paged_sliding_attention,
)

pytestmark = pytest.mark.integration

SMALL = SparseShape(window=8, stride=4, block=16, top=3, first=1, recent=1, sliding=24)
KV_HEADS, D, D_V = 2, 6, 4
SPARE = 3
"""Pages that no sequence has."""


def ends(counts):
    return torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)


class Cache:
    """What a server keeps: pages in an order of their own, filled step by step."""

    def __init__(self, page_tokens, lengths, seed, kept_slots=None, fill=float("nan")):
        self.page_tokens, self.lengths = page_tokens, lengths
        counts = [-(-length // page_tokens) for length in lengths]
        order = torch.randperm(sum(counts) + SPARE, generator=torch.Generator().manual_seed(seed))
        self.pages = torch.full((len(lengths), max(counts)), -1)
        for number, own in enumerate(order[: sum(counts)].split(counts)):
            self.pages[number, : len(own)] = own

        def made(slots, size):
            return torch.full((len(order), KV_HEADS, slots, size), fill, dtype=torch.float64)

        kept_slots = kept_slots or page_tokens
        self.k, self.v = made(page_tokens, D), made(page_tokens, D_V)
        self.coarse_k, self.coarse_v = made(kept_slots, D), made(page_tokens, D_V)
        slots = page_tokens // SMALL.stride
        self.entries_k, self.entries_v = made(slots, D), made(slots, D_V)
        self.windows = 0

    def step(self, sequences, begins, stops):
        """The new tokens of a step, from ``begins`` to ``stops`` of each of some sequences."""
        paging = Paging(
            self.pages[sequences],
            ends([b - a for a, b in zip(begins, stops, strict=True)]),
            ends(stops),
        )
        return NewTokens.of(paging, self.page_tokens, SMALL)

    def fill(self, sequences, begins, stops, k, v):
        """Takes new tokens, and makes the entries of the windows that they complete."""
        new = self.step(sequences, begins, stops)
        rows = [slice(a, b) for a, b in zip(begins, stops, strict=True)]
        x = [torch.cat([t[s][r] for s, r in zip(sequences, rows, strict=True)]) for t in (k, v)]
        new.write(x[0], self.k)
        new.write(x[1], self.v)
        for part, kept, entries in (
            (x[0], self.coarse_k, self.entries_k),
            (x[1], self.coarse_v, self.entries_v),
        ):
            windows = new.windows(part, kept)
            new.write_entries(windows.mean(1), entries)
        self.windows += new.first.numel()
        return new.paging


def drawn(seed, lengths, heads=4):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return [
        [normal(n, *size) for n in lengths]
        for size in ((heads, D), (KV_HEADS, D), (KV_HEADS, D_V), (heads, 3))
    ]


def twin(q, k, v, gates, begin, stop):
    """One sequence's new tokens by the mathematics, all entries made again."""
    known_k, known_v = k[:stop], v[:stop]
    return naive.native_sparse_attention(
        *(q[begin:stop], known_k, known_v),
        *(naive.mean_compress(known_k, SMALL), naive.mean_compress(known_v, SMALL)),
        *(gates[begin:stop], SMALL, D**-0.5),
    )


def attend(cache, paging, q, gates):
    return paged_native_sparse_attention(
        *(q, cache.k, cache.v, cache.entries_k, cache.entries_v, gates, paging, SMALL)
    )


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**16),
    page_tokens=st.sampled_from([4, 8, 12, 16, 64]),
    lengths=st.lists(st.integers(1, 130), min_size=1, max_size=3),
    data=st.data(),
)
def test_any_steps_over_any_pages_give_the_twins_output(seed, page_tokens, lengths, data):
    """NaN everywhere but in what was written; cuts may lie anywhere, and sequences skip steps."""
    q, k, v, gates = drawn(seed, lengths)
    slots = min(page_tokens, SMALL.window)
    cache = Cache(page_tokens, lengths, seed, slots)
    done = [0] * len(lengths)
    while done != lengths:
        sequences = [n for n, length in enumerate(lengths) if done[n] < length]
        if len(sequences) > 1 and data.draw(st.booleans()):
            sequences = sequences[1:]
        begins = [done[n] for n in sequences]
        stops = [
            min(lengths[n], done[n] + data.draw(st.sampled_from([1, 1, 3, 9, 40, 200])))
            for n in sequences
        ]
        paging = cache.fill(sequences, begins, stops, k, v)
        parts = list(zip(sequences, begins, stops, strict=True))
        new = [torch.cat([x[n][a:b] for n, a, b in parts]) for x in (q, gates)]
        out = attend(cache, paging, *new)
        expected = [twin(*(x[n] for x in (q, k, v, gates)), a, b) for n, a, b in parts]
        torch.testing.assert_close(out, torch.cat(expected))
        for n, stop in zip(sequences, stops, strict=True):
            done[n] = stop
    assert cache.windows == sum(SMALL.entries(n) for n in lengths)


def filled(seed, page_tokens, lengths, order=0):
    q, k, v, gates = drawn(seed, lengths)
    cache = Cache(page_tokens, lengths, order)
    every = list(range(len(lengths)))
    cache.fill(every, [0] * len(lengths), lengths, k, v)
    return cache, q, k, v, gates


def asked(cache, begins):
    stops = cache.lengths
    counts = [b - a for a, b in zip(begins, stops, strict=True)]
    return Paging(cache.pages, ends(counts), ends(stops))


def tails(x, begins):
    return torch.cat([part[a:] for part, a in zip(x, begins, strict=True)])


@settings(max_examples=15)
@given(seed=st.integers(0, 2**16), order=st.integers(1, 2**16))
def test_where_the_pages_lie_changes_no_bit(seed, order):
    lengths, begins = [100, 37, 5], [99, 20, 0]
    outs = []
    for arrangement in (0, order):
        cache, q, _, _, gates = filled(seed, 8, lengths, arrangement)
        outs.append(attend(cache, asked(cache, begins), tails(q, begins), tails(gates, begins)))
    assert torch.equal(*outs)


@pytest.mark.parametrize(
    ("lengths", "begins"),
    [
        ([150, 40], [149, 39]),
        ([150, 10, 3], [149, 9, 2]),
        ([3, 7], [2, 6]),
        ([150, 40], [10, 39]),
        ([150, 40], [0, 0]),
    ],
)
def test_each_branch_is_that_of_packed_sequences(lengths, begins):
    """Where few queries are new their blocks are read alone, elsewhere all; and both in a batch."""
    cache, q, k, v, _ = filled(1, 8, lengths)
    paging, new = asked(cache, begins), tails(q, begins)
    blocks = paged_select_blocks(new, cache.entries_k, paging, SMALL)
    fine, fine_lse = paged_selected_attention(
        new, cache.k, cache.v, blocks.flip(-1), paging, block=16, workspace_bytes=1
    )
    near, near_lse = paged_sliding_attention(new, cache.k, cache.v, paging, window=24)
    at = 0
    for n, begin in enumerate(begins):
        rows = slice(at, at + lengths[n] - begin)
        own = q[n][begin:], k[n], v[n]
        entries = naive.mean_compress(k[n], SMALL)
        chosen = naive.select(own[0], entries, lengths[n], SMALL, D**-0.5)
        assert torch.equal(blocks[:, rows], chosen)
        expected = naive.selected(*own, chosen, 16, D**-0.5)
        torch.testing.assert_close((fine[rows], fine_lse[rows]), expected)
        expected = naive.sliding(*own, 24, D**-0.5)
        torch.testing.assert_close((near[rows], near_lse[rows]), expected)
        at = rows.stop


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**16),
    lengths=st.lists(st.sampled_from([1, 7, 8, 9, 30, 60, 150, 400]), min_size=1, max_size=6),
    workspace=st.sampled_from([1, 20_000, 2**28]),
)
def test_sequences_of_any_lengths_decode_as_each_alone(seed, lengths, workspace):
    begins = [n - 1 for n in lengths]
    cache, q, k, v, _ = filled(seed, 8, lengths)
    paging, new = asked(cache, begins), tails(q, begins)
    blocks = paged_select_blocks(new, cache.entries_k, paging, SMALL, workspace_bytes=workspace)
    coarse, lse = paged_compressed_attention(
        new, cache.entries_k, cache.entries_v, paging, SMALL, workspace_bytes=workspace
    )
    for n, length in enumerate(lengths):
        entries = [naive.mean_compress(x[n], SMALL) for x in (k, v)]
        own = q[n][begins[n] :]
        expected = naive.select(own, entries[0], length, SMALL, D**-0.5)
        assert torch.equal(blocks[:, n : n + 1], expected)
        wanted = naive.compressed(own, *entries, length, SMALL, D**-0.5)
        torch.testing.assert_close(
            (coarse[n : n + 1], lse[n : n + 1]), (wanted[0], wanted[1]), check_stride=False
        )


def test_one_long_sequence_does_not_have_the_others_padded_to_it(monkeypatch):
    """Of 8 short requests and a long one, what is read is little more than what there is."""
    lengths = [100] * 8 + [3000]
    begins = [n - 1 for n in lengths]
    cache, q, *_ = filled(7, 8, lengths)
    read = []
    real = paged._read

    def counting(cache, paging, sequence, slot):
        read.append(sequence.numel() * slot.shape[-1])
        return real(cache, paging, sequence, slot)

    monkeypatch.setattr(paged, "_read", counting)
    paged_select_blocks(tails(q, begins), cache.entries_k, asked(cache, begins), SMALL)
    assert sum(read) == sum(SMALL.entries(n) for n in lengths)


@pytest.mark.parametrize("length", [150, 300])
def test_ids_that_are_none_do_not_count(length):
    """Where all tokens are read, and where the blocks of each query are."""
    lengths, begins = [length], [length - 2]
    cache, q, k, v, _ = filled(2, 8, lengths)
    paging, new = asked(cache, begins), tails(q, begins)
    odd = torch.tensor([[[-7, 3, 3, 40, 1]] * 2, [[2, -1, 2, 8, 2**30]] * 2], dtype=torch.int32)
    out = paged_selected_attention(new, cache.k, cache.v, odd, paging, block=16)
    expected = naive.selected(new, k[0], v[0], odd, 16, D**-0.5)
    torch.testing.assert_close(out, expected)
    none = torch.full_like(odd, -1)
    out, lse = paged_selected_attention(new, cache.k, cache.v, none, paging, block=16)
    assert not out.any()
    assert (lse == float("-inf")).all()


@pytest.mark.parametrize("begin", [149, 0])
def test_what_is_not_chosen_never_reaches_an_output(begin):
    """A block of no numbers that one query's list has not, and every page of another request."""
    lengths, begins = [150, 60], [begin, 59]
    cache, q, *_ = filled(3, 8, lengths)
    paging, new = asked(cache, begins), tails(q, begins)
    blocks = torch.tensor([0, 2, 9], dtype=torch.int32).expand(KV_HEADS, new.shape[0], 3)
    before, _ = paged_selected_attention(new, cache.k, cache.v, blocks, paging, block=16)
    near, _ = paged_sliding_attention(new, cache.k, cache.v, paging, window=24)
    own = slice(0, lengths[0] - begin)
    for x in (cache.k, cache.v):
        x[cache.pages[0, 2:4]] = float("nan")  # Block 1.
        x[cache.pages[1][cache.pages[1] >= 0]] = float("inf")
    after, _ = paged_selected_attention(new, cache.k, cache.v, blocks, paging, block=16)
    assert torch.equal(before[own], after[own])
    rows = slice(max(begin, 32 + 24) - begin, own.stop)
    near_after, _ = paged_sliding_attention(new, cache.k, cache.v, paging, window=24)
    assert torch.equal(near[rows], near_after[rows])
    assert not after[own.stop :].isfinite().all()


def test_a_decode_step_compresses_the_one_window_that_it_completes():
    lengths = [1000]
    cache = Cache(16, lengths, 0)
    for stop in range(990, 1000):
        new = cache.step([0], [stop - 1], [stop])
        assert new.first.tolist() == ([stop - 8] if stop % 4 == 0 else [])
        assert new.windows(torch.zeros(1, KV_HEADS, D), cache.coarse_k.float()).shape[0] == len(
            new.first
        )


def test_a_decode_step_reads_the_chosen_blocks_and_the_window_alone():
    """All other pages are none: reading one of them fails."""
    lengths, begins = [160, 150], [159, 149]
    cache, q, k, v, _ = filled(6, 8, lengths)
    paging, new = asked(cache, begins), tails(q, begins)
    blocks = torch.tensor([0, 4], dtype=torch.int32).expand(KV_HEADS, 2, 2)
    needed = torch.tensor([0, 1, 8, 9])
    only = torch.full_like(cache.pages, 10**6)
    only[:, needed] = cache.pages[:, needed]
    chosen = Paging(only, paging.cu_queries, paging.cu_keys)
    out = paged_selected_attention(new, cache.k, cache.v, blocks, chosen, block=16)
    late = torch.arange(only.shape[1]) >= (150 - 24) // 8
    near = Paging(cache.pages.masked_fill(~late, 10**6), paging.cu_queries, paging.cu_keys)
    window = paged_sliding_attention(new, cache.k, cache.v, near, window=24)
    for n in range(2):
        own = q[n][begins[n] :], k[n], v[n]
        expected = naive.selected(*own, blocks[:, n : n + 1], 16, D**-0.5)
        torch.testing.assert_close((out[0][n : n + 1], out[1][n : n + 1]), expected)
        expected = naive.sliding(*own, 24, D**-0.5)
        torch.testing.assert_close((window[0][n : n + 1], window[1][n : n + 1]), expected)
    other = Paging(only.roll(1, -1), paging.cu_queries, paging.cu_keys)
    with pytest.raises(IndexError):
        paged_selected_attention(new, cache.k, cache.v, blocks, other, block=16)


def test_a_page_that_another_sequence_fills_in_the_same_step_is_read_filled():
    """Two requests with one beginning: the second one is given the first one's pages at once."""
    q, k, v, gates = drawn(5, [64, 64])
    for x in (k, v):
        x[1][:32] = x[0][:32]
    cache = Cache(16, [64, 64], 0, 8)
    cache.pages[1, :2] = cache.pages[0, :2]
    paging = cache.fill([0, 1], [0, 32], [64, 64], k, v)
    out = attend(cache, paging, tails(q, [0, 32]), tails(gates, [0, 32]))
    expected = [twin(q[0], k[0], v[0], gates[0], 0, 64), twin(q[1], k[1], v[1], gates[1], 32, 64)]
    torch.testing.assert_close(out, torch.cat(expected))


def test_sizes_that_do_not_fit_are_named():
    cache, q, *_ = filled(0, 8, [20])
    paging = asked(cache, [0])
    with pytest.raises(ValueError, match="must be \\[pages, kv_heads, slots, size\\]"):
        paged_sliding_attention(q[0], cache.k[0], cache.v[0], paging, window=4)
    wrong = Paging(cache.pages.repeat(2, 1), paging.cu_queries, paging.cu_keys)
    with pytest.raises(ValueError, match="2 sequences have pages, 1 have ends"):
        paged_sliding_attention(q[0], cache.k, cache.v, wrong, window=4)
    with pytest.raises(ValueError, match="end within a stride of 4"):
        NewTokens.of(paging, 10, SMALL)
    with pytest.raises(ValueError, match="4 slots do not hold a window of 8"):
        NewTokens.of(paging, 8, SMALL).windows(q[0][:, :2], cache.coarse_k[:, :, :4])


def test_the_packed_windows_are_those_of_the_pages():
    """The entries that training makes are, number for number, those of the cache."""
    lengths = [50, 7, 31]
    cache, _, k, v, _ = filled(4, 16, lengths)
    packed = Windows.of(ends(lengths), sum(lengths), SMALL)
    for x, entries in ((k, cache.entries_k), (v, cache.entries_v)):
        expected = packed.mean(torch.cat(x))
        at = 0
        for n, length in enumerate(lengths):
            for entry in range(SMALL.entries(length)):
                slot = entry + SMALL.reach
                found = entries[cache.pages[n, slot // 4], :, slot % 4]
                assert torch.equal(found, expected[at])
                at += 1
