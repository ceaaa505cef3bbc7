"""Native sparse attention in plain torch, one sequence at a time: the reference of every kernel.

Queries are ``[queries, heads, d]``, keys and values ``[keys, kv_heads, d or d_v]``; the last query
belongs to the last key, so fewer queries than keys are the end of a sequence. Head ``h`` reads the
KV head ``h // group``. Logarithms are natural. A query that sees nothing has output 0 and
logarithm minus infinity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.kernels.sparse.shape import SparseShape

FORCED = float("inf")


def positions(queries: int, keys: int, device: torch.device) -> Tensor:
    """The key that each query belongs to, ``[queries]``."""
    return torch.arange(keys - queries, keys, device=device)


def masked(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention under a mask ``[kv_heads or 1, queries, keys]``.

    Returns:
        Output ``[queries, heads, d_v]``, logarithm of the sum of exponentials ``[queries, heads]``,
        and probabilities ``[heads, queries, keys]``.
    """
    group = q.shape[1] // k.shape[1]
    logits = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * scale
    mask = visible.expand(k.shape[1], *visible.shape[1:]).repeat_interleave(group, 0)
    logits = logits.masked_fill(~mask, float("-inf"))
    seen = mask.any(-1)
    lse = torch.logsumexp(logits.masked_fill(~seen[..., None], 0.0), -1)
    p = torch.exp(logits - lse[..., None]).masked_fill(~mask, 0.0)
    out = torch.einsum("hqk,khd->qhd", p, v.repeat_interleave(group, 1))
    return out, lse.masked_fill(~seen, float("-inf")).T, p


def mean_compress(x: Tensor, shape: SparseShape) -> Tensor:
    """The mean of each window of tokens, ``[entries, kv_heads, d]``."""
    if shape.entries(x.shape[0]) == 0:
        return x[:0]
    return x.unfold(0, shape.window, shape.stride).mean(-1)


def linear_compress(x: Tensor, weight: Tensor, position: Tensor, shape: SparseShape) -> Tensor:
    """Learned maps of windows, ``weight [kv_heads, window * d, out]``, ``position [window, d]``."""
    if shape.entries(x.shape[0]) == 0:
        return x.new_zeros(0, x.shape[1], weight.shape[-1])
    windows = x.unfold(0, shape.window, shape.stride).transpose(-1, -2) + position
    return torch.einsum("ehi,hio->eho", windows.flatten(-2), weight)


def compressed(
    q: Tensor, k: Tensor, v: Tensor, keys: int, shape: SparseShape, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention to the compressed entries ``k, v`` of ``keys`` tokens; what `masked` returns."""
    at = positions(q.shape[0], keys, q.device)
    ends = torch.arange(k.shape[0], device=q.device) * shape.stride + shape.window - 1
    return masked(q, k, v, (ends <= at[:, None])[None], scale)


def importance(p: Tensor, keys: int, kv_heads: int, shape: SparseShape) -> Tensor:
    """Scores of blocks ``[kv_heads, queries, blocks]``, summed over each group's heads.

    Args:
        p: probabilities of the compressed entries ``[heads, queries, entries]``.
        keys: tokens of the sequence.
        kv_heads: KV heads.
        shape: sizes.
    """
    blocks = -(-keys // shape.block)
    summed = p.unflatten(0, (kv_heads, -1)).sum(1)
    need = blocks * shape.entries_per_block
    padded = torch.nn.functional.pad(summed, (shape.reach, need - p.shape[-1]))
    taps = padded.unfold(-1, len(shape.weights), shape.entries_per_block)
    return (taps * torch.tensor(shape.weights, dtype=p.dtype, device=p.device)).sum(-1)


def top_blocks(scores: Tensor, keys: int, shape: SparseShape) -> Tensor:
    """The blocks of each query, ascending, padded with -1: ``[kv_heads, queries, top]`` int32.

    Among equal scores the lower block wins.
    """
    at = positions(scores.shape[1], keys, scores.device)
    return top_blocks_at(scores, at, shape)


def top_blocks_at(scores: Tensor, at: Tensor, shape: SparseShape) -> Tensor:
    """`top_blocks` of queries at positions ``at [queries]``, each of a sequence of its own."""
    blocks = scores.shape[-1]
    own = at[:, None] // shape.block
    ids = torch.arange(blocks, device=scores.device)
    forced = (ids < shape.first) | (ids > own - shape.recent)
    ranked = scores.float().masked_fill(forced, FORCED).masked_fill(ids > own, -1.0)
    kept = ranked.sort(dim=-1, descending=True, stable=True)
    chosen = kept.indices[..., : shape.top]
    absent = kept.values[..., : shape.top] < 0
    ordered = chosen.masked_fill(absent, blocks).sort(-1).values.int()
    ordered = ordered.masked_fill(ordered == blocks, -1)
    return torch.nn.functional.pad(ordered, (0, shape.top - ordered.shape[-1]), value=-1)


def select(q: Tensor, k: Tensor, keys: int, shape: SparseShape, scale: float) -> Tensor:
    """The blocks that queries choose by their attention to compressed keys ``k``."""
    p = compressed(q, k, k, keys, shape, scale)[2]
    return top_blocks(importance(p, keys, k.shape[1], shape), keys, shape)


def block_mask(indices: Tensor, queries: int, keys: int, block: int) -> Tensor:
    """What lists of blocks show, ``[kv_heads, queries, keys]``; absent and future ids nothing."""
    at = positions(queries, keys, indices.device)[:, None]
    blocks = -(-keys // block)
    valid = (indices >= 0) & (indices < blocks)
    chosen = torch.zeros(*indices.shape[:2], blocks + 1, dtype=torch.bool, device=indices.device)
    chosen.scatter_(-1, indices.long().masked_fill(~valid, blocks), True)
    key = torch.arange(keys, device=indices.device)
    return chosen[..., key // block] & (key <= at)


def selected(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention to blocks ``indices [kv_heads, queries, top]``: output, logarithm."""
    visible = block_mask(indices, q.shape[0], k.shape[0], block)
    return masked(q, k, v, visible, scale)[:2]


def sliding(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> tuple[Tensor, Tensor]:
    """Attention to the ``window`` latest tokens, the query's own among them: output, logarithm."""
    at = positions(q.shape[0], k.shape[0], q.device)[:, None]
    key = torch.arange(k.shape[0], device=q.device)
    return masked(q, k, v, ((key <= at) & (key > at - window))[None], scale)[:2]


def native_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    compressed_k: Tensor,
    compressed_v: Tensor,
    gates: Tensor,
    shape: SparseShape,
    scale: float,
    sliding_kv: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The three branches, mixed by ``gates [queries, heads or 1, 3]`` (NSA, equation 5).

    The sliding branch may have keys and values of its own.
    """
    keys = k.shape[0]
    coarse, _, p = compressed(q, compressed_k, compressed_v, keys, shape, scale)
    blocks = top_blocks(importance(p.detach(), keys, k.shape[1], shape), keys, shape)
    branches = (
        coarse,
        selected(q, k, v, blocks, shape.block, scale)[0],
        sliding(q, *(sliding_kv or (k, v)), shape.sliding, scale)[0],
    )
    return (torch.stack(branches, -1) * gates[:, :, None]).sum(-1)
