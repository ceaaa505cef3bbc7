"""The Triton kernels of spans, launched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.kernels.sparse import spans
from trimtab.kernels.sparse.gpu_tiles import Need, Tile, tile
from trimtab.kernels.sparse.launch import Attempt, in_torch, launched, of_keys, of_values


def _sizes(q: Tensor, k: Tensor, v: Tensor, how: Tile) -> dict[str, Any]:
    sizes = {**of_keys(q, k), **of_values(v), **launched(how)}
    return {**sizes, "ROWS": how.rows, "KEYS": how.columns}


def forward(
    q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and natural logarithm."""
    from trimtab.kernels.sparse import triton_spans as kernels

    out = q.new_empty(*q.shape[:2], v.shape[-1])
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    count = q.shape[0]
    how = tile("span", Need.of(q, v))
    grid = (-(-count // how.rows), q.shape[1])
    for attempt in Attempt.both(grid, how, q):
        kernels.forward[attempt.grid](
            *(q, k, v, out, lse, low, high, attempt.odd, count, scale),
            **_sizes(q, k, v, attempt.how),
            AGAIN=attempt.again,
        )
    return out, lse


def backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    low: Tensor,
    high: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, the same bits at every run."""
    from trimtab.kernels.sparse import triton_spans as kernels

    if in_torch("span_backward", Need.of(q, v)):
        return spans.backward(gradient, q, k, v, out, lse, low, high, scale)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = (gradient.float() * out.float()).sum(-1)
    how = tile("span_backward", Need.of(q, v))
    sizes = _sizes(q, k, v, how)
    count, tokens = q.shape[0], k.shape[0]
    grid = (-(-count // how.rows), q.shape[1])
    for attempt in Attempt.both(grid, how, q):
        kernels.backward_queries[attempt.grid](
            *(q, k, v, gradient, lse, delta, dq, low, high, attempt.odd, count, scale),
            **_sizes(q, k, v, attempt.how),
            AGAIN=attempt.again,
        )
    begins = torch.arange(0, tokens, how.columns, device=q.device)
    first = torch.searchsorted(high, begins, right=True)
    end = torch.searchsorted(low, (begins + how.columns).clamp(max=tokens))
    kernels.backward_keys[(begins.numel(), k.shape[1])](
        *(q, k, v, gradient, lse, delta, dk, dv, low, high, first, end, count, tokens, scale),
        **sizes,
    )
    return dq, dk, dv
