"""Attention of each query to a span of neighbouring keys, in plain torch.

Compressed entries that a query sees are such a span, and so is its sliding window. Neither end of
the spans of packed queries ever falls, so a tile of queries sees one slice of keys.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trimtab.kernels.sparse import tiles
from trimtab.kernels.sparse.tiles import wide

_MOST_LOGITS = 1 << 23


def _tiles(low: Tensor, high: Tensor, heads: int) -> Iterator[tuple[slice, slice]]:
    """Queries, and the keys that any of them sees; about half of those are seen at least."""
    count = low.numel()
    width = (high - low).double().mean().item()
    advance = max(1, int(high[-1] - high[0])) / count
    wanted = min(1024.0, width / advance / 2, _MOST_LOGITS / (heads * max(1.0, width)))
    step = max(32, 1 << int(wanted).bit_length())
    begins = torch.arange(0, count, step, device=low.device)
    ends = (begins + step).clamp(max=count)
    bounds = (begins.tolist(), ends.tolist(), low[begins].tolist(), high[ends - 1].tolist())
    for begin, end, first, last in zip(*bounds, strict=True):
        if last > first:
            yield slice(begin, end), slice(first, last)


def _by_kv_head(x: Tensor, kv_heads: int) -> Tensor:
    """``[kv_heads, group * rows, d]`` from ``[rows, heads, d]``, in the type of sums."""
    parts: Tensor = wide(x).unflatten(1, (kv_heads, -1))
    return parts.permute(1, 2, 0, 3).flatten(1, 2)


def _by_query(x: Tensor, group: int) -> Tensor:
    """`_by_kv_head` undone, for ``[kv_heads, group * rows, …]``."""
    parts: Tensor = x.unflatten(1, (group, -1))
    return parts.movedim(2, 0).flatten(1, 2)


def _visible(low: Tensor, high: Tensor, keys: slice, group: int) -> Tensor:
    key = torch.arange(keys.start, keys.stop, device=low.device)
    return ((key >= low[:, None]) & (key < high[:, None])).repeat(group, 1)[None]


def forward(
    q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and natural logarithm."""
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    lse = torch.full(q.shape[:2], float("-inf"), dtype=wide(q[:0]).dtype, device=q.device)
    kv_heads = k.shape[1]
    group = q.shape[1] // kv_heads
    for rows, keys in _tiles(low, high, q.shape[1]):
        part, logarithms = tiles.attend(
            *(_by_kv_head(q[rows], kv_heads), wide(k[keys]).transpose(0, 1)),
            wide(v[keys]).transpose(0, 1),
            *(_visible(low[rows], high[rows], keys, group), scale),
        )
        out[rows] = _by_query(part, group).to(out.dtype)
        lse[rows] = _by_query(logarithms, group)
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
    """Gradients of queries, keys and values; the probabilities come from the saved logarithms."""
    dq = torch.zeros_like(q)
    dk, dv = torch.zeros_like(wide(k)), torch.zeros_like(wide(v))
    delta = (wide(gradient) * wide(out)).sum(-1)
    kv_heads = k.shape[1]
    group = q.shape[1] // kv_heads
    for rows, keys in _tiles(low, high, q.shape[1]):
        stats = (_by_kv_head(x[rows, :, None], kv_heads)[..., 0] for x in (lse, delta))
        part, more_k, more_v = tiles.differentiate(
            *(_by_kv_head(q[rows], kv_heads), wide(k[keys]).transpose(0, 1)),
            wide(v[keys]).transpose(0, 1),
            *(_visible(low[rows], high[rows], keys, group), scale),
            *(_by_kv_head(gradient[rows], kv_heads), *stats),
        )
        dq[rows] = _by_query(part, group).to(dq.dtype)
        dk[keys] += more_k.transpose(0, 1)
        dv[keys] += more_v.transpose(0, 1)
    return dq, dk.to(k.dtype), dv.to(v.dtype)
