"""Selected attention by gathering each query's keys: any device and dtype, a bounded workspace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.kernels.sparse.tables import Blocks, Queries


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some queries of one KV head: their rows, the keys of their blocks, and which are visible."""

    rows: slice
    heads: slice
    kv_head: int
    key: Tensor
    visible: Tensor


def _chunks(
    ids: Tensor, block: int, queries: Queries, blocks: Blocks, group: int, most: int
) -> Iterator[_Chunk]:
    kv_heads, count, top = ids.shape
    step = max(1, most // max(1, top * block))
    offset = torch.arange(block, device=ids.device)
    for kv_head in range(kv_heads):
        for begin in range(0, count, step):
            rows = slice(begin, min(count, begin + step))
            chosen = ids[kv_head, rows]
            safe = chosen.clamp(min=0)
            key = blocks.first[safe][..., None] + offset
            visible = (chosen >= 0)[..., None] & (offset < blocks.length[safe][..., None])
            visible &= key <= queries.last[rows, None, None]
            key = key.masked_fill(~visible, 0).flatten(1)
            heads = slice(kv_head * group, (kv_head + 1) * group)
            yield _Chunk(rows, heads, kv_head, key, visible.flatten(1))


def wide(x: Tensor) -> Tensor:
    """In the type that sums are made in: double stays double, all others become single."""
    return x if x.dtype == torch.float64 else x.float()


def _logits(q: Tensor, keys: Tensor, visible: Tensor, scale: float) -> Tensor:
    logits = torch.einsum("qgd,qkd->qgk", q, keys) * scale
    return logits.masked_fill(~visible[:, None], float("-inf"))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ids: Tensor,
    block: int,
    scale: float,
    queries: Queries,
    blocks: Blocks,
    most: int,
) -> tuple[Tensor, Tensor]:
    """Output and natural logarithm; ``most`` keys are gathered at once for one KV head."""
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    lse = torch.full(q.shape[:2], float("-inf"), dtype=wide(q[:0]).dtype, device=q.device)
    group = q.shape[1] // k.shape[1]
    for part in _chunks(ids, block, queries, blocks, group, most):
        keys, values = (wide(x[part.key, part.kv_head]) for x in (k, v))
        logits = _logits(wide(q[part.rows, part.heads]), keys, part.visible, scale)
        sums = torch.logsumexp(logits, -1)
        p = torch.exp(logits - sums.nan_to_num(neginf=0.0)[..., None])
        values = values.masked_fill(~part.visible[..., None], 0.0)
        out[part.rows, part.heads] = torch.einsum("qgk,qkd->qgd", p, values).to(out.dtype)
        lse[part.rows, part.heads] = sums
    return out, lse


def backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ids: Tensor,
    block: int,
    scale: float,
    queries: Queries,
    blocks: Blocks,
    most: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values; the probabilities come from the saved logarithms."""
    dq, dk, dv = (torch.zeros_like(wide(x)) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    delta = (wide(gradient) * wide(out)).sum(-1)
    for part in _chunks(ids, block, queries, blocks, group, most):
        rows, heads, keep = part.rows, part.heads, part.visible[..., None]
        keys, values = (wide(x[part.key, part.kv_head]).masked_fill(~keep, 0.0) for x in (k, v))
        query, above = wide(q[rows, heads]), wide(gradient[rows, heads])
        logits = _logits(query, keys, part.visible, scale)
        p = torch.exp(logits - lse[rows, heads].nan_to_num(neginf=0.0)[..., None])
        ds = p * (torch.einsum("qgd,qkd->qgk", above, values) - delta[rows, heads][..., None])
        dq[rows, heads] = torch.einsum("qgk,qkd->qgd", ds, keys) * scale
        places = part.key.flatten()
        dk[:, part.kv_head].index_add_(
            0, places, torch.einsum("qgk,qgd->qkd", ds, query).flatten(0, 1) * scale
        )
        dv[:, part.kv_head].index_add_(
            0, places, torch.einsum("qgk,qgd->qkd", p, above).flatten(0, 1)
        )
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
