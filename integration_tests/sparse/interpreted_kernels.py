"""Runs the Triton kernels on small sequences; fails where they differ from the mathematics.

On a GPU, or without one in Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from trimtab.kernels.sparse import (
    SparseShape,
    compressed_attention,
    launch,
    naive,
    select_blocks,
    selected_attention,
    selected_plan,
    sliding_attention,
)
from trimtab.kernels.sparse.launch import interpreted

selected_plan.SelectedPlan.dense_until = lambda *_: 0  # so that what is short has far blocks
DEVICE = "cpu" if interpreted() else "cuda"
torch.set_default_device(DEVICE)
SHAPE = SparseShape(window=8, stride=4, block=16, top=3, first=1, recent=1, sliding=24)


def agree(
    dtype,
    heads,
    kv_heads,
    d,
    d_v,
    queries,
    keys,
    tolerance,
    workspace_bytes=1 << 20,
    block=16,
    **way,
):
    generator = torch.Generator(DEVICE).manual_seed(0)

    def some(*shape):
        return torch.randn(*shape, generator=generator)

    q, k, v = some(queries, heads, d), some(keys, kv_heads, d), some(keys, kv_heads, d_v)
    above = some(queries, heads, d_v)
    cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32) for n in (queries, keys))
    indices = torch.randint(-1, 4, (kv_heads, queries, 3), generator=generator).int()
    ours = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    theirs = [x.to(dtype).float().requires_grad_() for x in (q, k, v)]
    out, lse = selected_attention(
        *(*ours, indices, cu_q, cu_k), block=block, workspace_bytes=workspace_bytes, **way
    )
    expected, expected_lse = naive.selected(*theirs, indices, block, d**-0.5)
    near = {"atol": tolerance, "rtol": tolerance}
    torch.testing.assert_close(out.float(), expected, **near)
    torch.testing.assert_close(lse, expected_lse, **near)
    out.backward(above.to(dtype))
    expected.backward(above)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad.float(), b.grad, **near)


def a_popular_block_is_cut_the_same_way_twice():
    """Its list is longer than a program takes, which is little here, in each of two segments."""
    whole = launch.fitted

    def in_short_chains(kernel, chosen):
        chosen, how = whole(kernel, chosen)
        return chosen, replace(how, tiles=2)

    tokens, heads = 60, 3
    generator = torch.Generator(DEVICE).manual_seed(3)
    qkv = [torch.randn(tokens, n, 16, generator=generator) for n in (heads, 1, 1)]
    cu = torch.tensor([0, tokens], dtype=torch.int32)
    indices = torch.stack([torch.zeros(tokens), torch.arange(tokens) // 16], -1).int()[None]
    found = []
    launch.fitted = in_short_chains
    for attend in (selected_attention, selected_attention, None):
        leaves = [x.clone().requires_grad_() for x in qkv]
        if attend is None:
            out, _ = naive.selected(*leaves, indices, 16, 0.25)
        else:
            out, _ = attend(*leaves, indices, cu, cu, block=16, scale=0.25, workspace_bytes=30_000)
        out.square().sum().backward()
        found.append([out, *(x.grad for x in leaves)])
    launch.fitted = whole
    for once, again, expected in zip(*found, strict=True):
        assert torch.equal(once, again)
        torch.testing.assert_close(once, expected, atol=1e-4, rtol=1e-4)


def select_agrees():
    generator = torch.Generator(DEVICE).manual_seed(1)
    q = torch.randn(30, 3, 16, generator=generator)
    k = torch.randn(90, 1, 16, generator=generator)
    entries = naive.mean_compress(k, SHAPE)
    cu = [torch.tensor([0, n], dtype=torch.int32) for n in (30, 90, len(entries))]
    expected = naive.select(q, entries, 90, SHAPE, 16**-0.5)
    assert torch.equal(select_blocks(q, entries, *cu, SHAPE), expected)
    _, lse = compressed_attention(q, entries, entries, *cu, SHAPE)
    assert torch.equal(select_blocks(q, entries, *cu, SHAPE, lse=lse), expected)
    # It is what is taken: heads of which all weights vanish have no say.
    first = select_blocks(q, entries, *cu, SHAPE, lse=lse + torch.tensor([0.0, 60.0, 60.0]))
    assert torch.equal(first, naive.select(q[:, :1], entries, 90, SHAPE, 16**-0.5))


def branch_agrees(dtype, heads, kv_heads, d, d_v, queries, tolerance, branch):
    """Two packed sequences, one of them shorter than a window."""
    generator = torch.Generator(DEVICE).manual_seed(2)
    keys, few = queries + 9, 5
    compressed = branch == "compressed"
    tokens = [SHAPE.entries(keys), 0] if compressed else [keys, few]
    cu_q, cu_k, cu_e = (
        torch.tensor([0, a, a + b], dtype=torch.int32)
        for a, b in ((queries, few), (keys, few), tokens)
    )
    qkv = [
        torch.randn(*sizes, generator=generator).to(dtype)
        for sizes in (
            (queries + few, heads, d),
            (sum(tokens), kv_heads, d),
            (sum(tokens), kv_heads, d_v),
        )
    ]
    ours = [x.clone().requires_grad_() for x in qkv]
    theirs = [x.float().requires_grad_() for x in qkv]
    if compressed:
        out, lse = compressed_attention(*ours, cu_q, cu_k, cu_e, SHAPE)
    else:
        out, lse = sliding_attention(*ours, cu_q, cu_k, window=SHAPE.sliding)
    expected = []
    for q, k, v, all_keys in zip(
        theirs[0].split([queries, few]),
        *(x.split(tokens) for x in theirs[1:]),
        (keys, few),
        strict=True,
    ):
        if compressed:
            expected.append(naive.compressed(q, k, v, all_keys, SHAPE, d**-0.5)[:2])
        else:
            expected.append(naive.sliding(q, k, v, SHAPE.sliding, d**-0.5))
    near = {"atol": tolerance, "rtol": tolerance}
    wanted, wanted_lse = (torch.cat(x) for x in zip(*expected, strict=True))
    torch.testing.assert_close(out.float(), wanted, **near)
    torch.testing.assert_close(lse, wanted_lse, **near)
    above = torch.randn(wanted.shape, generator=generator)
    out.backward(above.to(dtype))
    wanted.backward(above)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad.float(), b.grad, **near)


def branches_compile_into_one_graph():
    """Where queries lie is told by kernels in eager calls, and by torch where it traces."""
    generator = torch.Generator(DEVICE).manual_seed(4)
    q, k, v = (torch.randn(40, n, 16, generator=generator) for n in (2, 1, 1))
    cu = torch.tensor([0, 40], dtype=torch.int32)
    entries = naive.mean_compress(k, SHAPE)
    cu_entries = torch.tensor([0, len(entries)], dtype=torch.int32)

    def both(q, k, v, entries):
        near, _ = sliding_attention(q, k, v, cu, cu, window=9)
        coarse, lse = compressed_attention(q, entries, entries, cu, cu, cu_entries, SHAPE)
        return near, coarse, select_blocks(q, entries, cu, cu, cu_entries, SHAPE, lse=lse)

    expected = both(q, k, v, entries)
    found = torch.compile(both, fullgraph=True, backend="aot_eager")(q, k, v, entries)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


agree(torch.float32, 6, 2, 16, 24, 20, 50, 1e-4, workspace_bytes=20_000)
agree(torch.float32, 3, 3, 16, 16, 20, 40, 1e-4, workspace_bytes=9_000)  # two KV heads, then one
agree(torch.float32, 2, 1, 16, 16, 9, 200, 1e-4, block=128)  # its backward takes blocks in halves
agree(torch.float32, 26, 2, 16, 24, 20, 50, 1e-4)  # a query at a time
agree(torch.float16, 17, 1, 12, 16, 9, 200, 2e-2, block=128)
agree(torch.bfloat16, 32, 1, 16, 16, 5, 33, 6e-2)
agree(torch.float32, 1, 1, 136, 128, 5, 20, 1e-4)  # too wide for a backward in Triton
agree(torch.float16, 3, 3, 12, 16, 33, 33, 2e-2)
agree(torch.bfloat16, 5, 1, 16, 16, 33, 33, 6e-2)
agree(torch.float32, 6, 2, 16, 24, 20, 50, 1e-4, workspace_bytes=20_000, as_published=True)
agree(torch.float16, 3, 3, 12, 16, 33, 33, 2e-2, as_published=True)
a_popular_block_is_cut_the_same_way_twice()
select_agrees()
branches_compile_into_one_graph()
branch_agrees(torch.float32, 6, 2, 16, 24, 70, 1e-4, "sliding")
branch_agrees(torch.float32, 6, 2, 16, 24, 70, 1e-4, "compressed")
branch_agrees(torch.float32, 1, 1, 136, 136, 9, 1e-4, "sliding")
branch_agrees(torch.float16, 3, 3, 12, 16, 33, 2e-2, "sliding")
branch_agrees(torch.bfloat16, 5, 1, 16, 16, 33, 6e-2, "compressed")
