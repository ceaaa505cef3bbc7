"""The Triton kernels of spans, launched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.kernels.sparse.launch import Tile, interpreted, padded

KEYS, BACKWARD_KEYS = 64, 32
"""Keys of a tile."""

BACKWARD = Tile(rows=32, warps=4, stages=1)


def forward_tile(pad: int) -> Tile:
    """The widest tile whose sums stay in registers, for a padded head size."""
    return Tile(rows=64 if pad <= 128 else 32, warps=4, stages=2)


def _sizes(q: Tensor, k: Tensor, v: Tensor, tile: Tile, keys: int) -> dict[str, Any]:
    return {
        "HEADS": q.shape[1],
        "GROUP": q.shape[1] // k.shape[1],
        "D": q.shape[2],
        "D_V": v.shape[2],
        "PAD": padded(q.shape[2]),
        "PAD_V": padded(v.shape[2]),
        "ROWS": tile.rows,
        "KEYS": keys,
        "WIDEN": interpreted() and q.dtype == torch.bfloat16,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def forward(
    q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and natural logarithm."""
    from trimtab.kernels.sparse import triton_spans as kernels

    out = q.new_empty(*q.shape[:2], v.shape[-1])
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    count = q.shape[0]
    tile = forward_tile(max(padded(q.shape[2]), padded(v.shape[2])))
    kernels.forward[(-(-count // tile.rows), q.shape[1])](
        *(q, k, v, out, lse, low, high, count, scale), **_sizes(q, k, v, tile, KEYS)
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

    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = (gradient.float() * out.float()).sum(-1)
    sizes = _sizes(q, k, v, BACKWARD, BACKWARD_KEYS)
    count, tokens = q.shape[0], k.shape[0]
    kernels.backward_queries[(-(-count // BACKWARD.rows), q.shape[1])](
        *(q, k, v, gradient, lse, delta, dq, low, high, count, scale), **sizes
    )
    begins = torch.arange(0, tokens, BACKWARD_KEYS, device=q.device)
    first = torch.searchsorted(high, begins, right=True)
    end = torch.searchsorted(low, (begins + BACKWARD_KEYS).clamp(max=tokens))
    kernels.backward_keys[(begins.numel(), k.shape[1])](
        *(q, k, v, gradient, lse, delta, dk, dv, low, high, first, end, count, tokens, scale),
        **sizes,
    )
    return dq, dk, dv
