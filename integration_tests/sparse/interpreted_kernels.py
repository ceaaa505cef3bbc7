"""Runs the Triton kernels in Triton's interpreter on small sequences; fails where they differ."""

from __future__ import annotations

import torch

from trimtab.kernels.sparse import SparseShape, naive, select_blocks, selected_attention

SHAPE = SparseShape(window=8, stride=4, block=16, top=3, first=1, recent=1)


def agree(dtype, heads, kv_heads, d, d_v, queries, keys, tolerance, workspace_bytes=1 << 20):
    generator = torch.Generator().manual_seed(0)

    def some(*shape):
        return torch.randn(*shape, generator=generator)

    q, k, v = some(queries, heads, d), some(keys, kv_heads, d), some(keys, kv_heads, d_v)
    above = some(queries, heads, d_v)
    cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32) for n in (queries, keys))
    indices = torch.randint(-1, 4, (kv_heads, queries, 3), generator=generator).int()
    ours = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    theirs = [x.to(dtype).float().requires_grad_() for x in (q, k, v)]
    out, lse = selected_attention(
        *(*ours, indices, cu_q, cu_k), block=16, workspace_bytes=workspace_bytes
    )
    expected, expected_lse = naive.selected(*theirs, indices, 16, d**-0.5)
    near = {"atol": tolerance, "rtol": tolerance}
    torch.testing.assert_close(out.float(), expected, **near)
    torch.testing.assert_close(lse, expected_lse, **near)
    out.backward(above.to(dtype))
    expected.backward(above)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad.float(), b.grad, **near)


def select_agrees():
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(30, 3, 16, generator=generator)
    k = torch.randn(90, 1, 16, generator=generator)
    entries = naive.mean_compress(k, SHAPE)
    cu = [torch.tensor([0, n], dtype=torch.int32) for n in (30, 90, len(entries))]
    chosen = select_blocks(q, entries, *cu, SHAPE)
    assert torch.equal(chosen, naive.select(q, entries, 90, SHAPE, 16**-0.5))


agree(torch.float32, 6, 2, 16, 24, 20, 50, 1e-4, workspace_bytes=20_000)
agree(torch.float16, 3, 3, 12, 16, 33, 33, 2e-2)
agree(torch.bfloat16, 5, 1, 16, 16, 33, 33, 6e-2)
select_agrees()
