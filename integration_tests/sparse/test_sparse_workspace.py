"""What sparse attention on a CPU allocates beside its results keeps to its workspace."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from trimtab.kernels.sparse import (
    Paging,
    SparseShape,
    blockwise,
    naive,
    paged_compressed_attention,
    paged_select_blocks,
    tables,
)
from trimtab.kernels.sparse.chosen import Chosen
from trimtab.kernels.sparse.paging import ends

pytestmark = pytest.mark.integration

MB = 2**20


def peak_bytes(work):
    """The most that was allocated at once while ``work`` ran, and what it gave back."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = work()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most, result


def chosen_of(seed, tokens, heads, kv_heads, d, d_v, top, block, dtype, workspace, spread):
    """One sequence whose queries choose among the first ``spread`` of what they can see."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (tokens, heads, d), (tokens, kv_heads, d), (tokens, kv_heads, d_v)
    q, k, v = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    seen = torch.arange(tokens) // block + 1
    draw = torch.rand(kv_heads, tokens, top, generator=generator)
    indices = (draw * seen[:, None] * spread).long()
    cu = torch.tensor([0, tokens], dtype=torch.int32)
    queries, blocks = tables.place_queries(cu, cu, tokens, block), tables.cut(cu, tokens, block)
    ids = tables.number_through(indices, queries, blocks)
    return Chosen(q, k, v, ids, block, d**-0.5, queries, blocks, workspace), indices


def test_the_peak_is_measured():
    kept = torch.zeros(MB)

    def work():
        for _ in range(3):
            kept.add_(torch.zeros(2 * MB)[:MB])

    assert peak_bytes(work)[0] == 8 * MB


SIZES = [
    (512, 8, 2, 64, 64, 8, 64, torch.float32),
    (512, 4, 4, 128, 96, 4, 32, torch.bfloat16),
    (256, 6, 2, 32, 32, 4, 64, torch.float64),
]


@pytest.mark.parametrize("spread", [1.0, 0.01])
@pytest.mark.parametrize("workspace", [3 * MB, 8 * MB])
@pytest.mark.parametrize("sizes", SIZES)
def test_all_temporaries_keep_to_the_workspace(sizes, workspace, spread):
    """Blocks that all choose, and blocks that few queries each choose, with tiles half empty."""
    chosen, _ = chosen_of(1, *sizes, workspace, spread)
    forward, (out, lse) = peak_bytes(lambda: blockwise.forward(chosen))
    results = out.nbytes + lse.nbytes
    assert forward - results <= workspace
    gradient = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    peak, gradients = peak_bytes(lambda: blockwise.backward(gradient, out, lse, chosen))
    wide = 8 if out.dtype == torch.float64 else 4
    blocks = chosen.k.shape[1] * chosen.blocks.first.numel() * chosen.block
    sums = blocks * (chosen.k.shape[-1] + chosen.v.shape[-1]) * wide
    assert peak - sum(g.nbytes for g in gradients) - sums <= workspace


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[9000] * 8, [200] * 30 + [9000] * 2])
def test_decoding_over_pages_keeps_to_the_workspace(lengths, dtype):
    shape, slots, pages = SparseShape(), 8, 75
    generator = torch.Generator().manual_seed(2)
    entries = [torch.randn(pages, 2, slots, 64, generator=generator).to(dtype) for _ in range(2)]
    q = torch.randn(len(lengths), 8, 64, generator=generator).to(dtype)
    table = torch.randint(pages, (len(lengths), 71), generator=generator)
    paging = Paging(table, ends(torch.ones(len(lengths)).long()), ends(torch.tensor(lengths)))

    def attend(workspace):
        return paged_compressed_attention(q, *entries, paging, shape, workspace_bytes=workspace)

    def select(workspace):
        return paged_select_blocks(q, entries[0], paging, shape, workspace_bytes=workspace)

    for work in (attend, select):
        peak, _ = peak_bytes(lambda work=work: work(2 * MB))
        assert peak <= 2.2 * MB  # results and tables of the sequences come on top


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 99),
    st.integers(1, 150),
    st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    st.integers(1, 5),
    st.sampled_from([0, 1, 30_000, 200_000, 10**9]),
)
def test_any_workspace_gives_the_attention_of_the_mathematics(seed, tokens, heads, top, workspace):
    sizes = (tokens, *heads, 8, 6, top, 16, torch.float64)
    chosen, indices = chosen_of(seed, *sizes, workspace, 1.0)
    inputs = [x.requires_grad_() for x in (chosen.q, chosen.k, chosen.v)]
    expected, expected_lse = naive.selected(*inputs, indices, 16, chosen.scale)
    gradient = torch.randn(expected.shape, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, inputs, gradient)
    with torch.no_grad():
        out, lse = blockwise.forward(chosen)
        found = blockwise.backward(gradient, out, lse, chosen)
    torch.testing.assert_close((out, lse), (expected, expected_lse))
    torch.testing.assert_close(found, wanted)
