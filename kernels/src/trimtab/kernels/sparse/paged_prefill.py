"""Sparse prefill of one request of a dense model on a GPU, out of the pages of a server's cache.

`prefill` does the same on a CPU; `selectors` says which blocks are kept, here as there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import log
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from trimtab.kernels.sparse.block_sparse import TILE
from trimtab.kernels.sparse.gpu_tiles import Need, tile
from trimtab.kernels.sparse.launch import launched, of_keys
from trimtab.kernels.sparse.selectors import SAMPLE_STEPS, Selection

LARGEST_HEAD = 256
"""Dimensions of keys, and as many of values."""

ESTIMATE_BYTES = 128 * 2**20
"""What one estimate may take; its steps hold some three of them at a time."""


@dataclass(frozen=True, slots=True)
class PagedCache:
    """The pages of one layer, and which of them a request has.

    Raises:
        ValueError: keys and values do not lie alike.
    """

    k: Tensor
    """``[pages, kv_heads, page_tokens, d]`` with any strides but the last one's, which is 1."""
    v: Tensor
    """As large as the keys, and with their strides."""
    pages: Tensor
    """The request's pages in the order of its tokens, ``[pages]``; more do no harm."""

    def __post_init__(self) -> None:
        if self.k.shape != self.v.shape or self.k.stride() != self.v.stride():
            raise ValueError(
                f"keys {tuple(self.k.shape)} and values {tuple(self.v.shape)} lie differently in"
                " the cache; they must have the same sizes and strides"
            )
        if self.k.stride(3) != 1:
            raise ValueError("a token's numbers do not lie side by side in the cache")

    def keys(self, tokens: int) -> Tensor:
        """The request's first keys, ``[tokens, kv_heads, d]``."""
        count = -(-tokens // self.k.shape[2])
        found = self.k[self.pages[:count].long()].transpose(1, 2).flatten(0, 1)
        return found[:tokens]

    def constants(self, q: Tensor) -> dict[str, Any]:
        """Those of kernels that read queries and the cache."""
        return {**of_keys(q, self.k.transpose(1, 2)[0]), "PAGE": self.k.shape[2], "BLOCK": TILE}

    @property
    def strides(self) -> tuple[int, int, int]:
        """Of pages, heads and tokens."""
        return self.k.stride(0), self.k.stride(1), self.k.stride(2)


def paged_prefill(
    q: Tensor, cache: PagedCache, position: int, out: Tensor, scale: float, selection: Selection
) -> Tensor:
    """Attention of one request's new tokens, written into ``out``; nothing waits for the GPU.

    Args:
        q: ``[queries, heads, d]``.
        cache: the request's keys and values, those of the new tokens included.
        position: the first query's place among the keys.
        out: ``[queries, heads, d]``.
        scale: of the logits.
        selection: which blocks are kept.

    Returns:
        The share of the causal blocks that was kept, a tensor of one number.

    Raises:
        ValueError: heads are larger than any tile.
    """
    q = q.contiguous()
    written = out if out.is_contiguous() else torch.empty_like(q)
    sampled = selection.selector in SAMPLE_STEPS
    keys = None if sampled else cache.keys(position + q.shape[0])
    kept: list[Tensor] = []
    causal = 0
    for rows in segments(q.shape[0], q.shape[1], position, selection):
        part, begin = q[rows], position + rows.start
        if keys is None:
            step = SAMPLE_STEPS[selection.selector]
            shares = block_shares(part, cache, begin, scale, step)
        else:
            shares = selection.estimate(part, keys[: begin + part.shape[0]], begin, scale)
        mask = selection.keep(shares, begin, part.shape[0])
        attend(part, cache, begin, mask, written[rows], scale)
        kept.append(mask.sum())
        causal += q.shape[1] * sum(
            (min(begin + at + TILE, begin + part.shape[0]) - 1) // TILE + 1
            for at in range(0, part.shape[0], TILE)
        )
    if written is not out:
        out.copy_(written)
    return torch.stack(kept).sum() / causal


def segments(queries: int, heads: int, position: int, selection: Selection) -> Iterator[slice]:
    """Whole tiles of queries whose estimate fits `ESTIMATE_BYTES`.

    Args:
        queries: how many there are.
        heads: their heads.
        position: the first query's place among the keys.
        selection: which blocks are kept.
    """
    blocks = -(-(position + queries) // TILE)
    step = SAMPLE_STEPS.get(selection.selector, 1)
    size = max(TILE, ESTIMATE_BYTES // (4 * heads * blocks) * step // TILE * TILE)
    yield from (slice(at, min(queries, at + size)) for at in range(0, queries, size))


def block_shares(q: Tensor, cache: PagedCache, position: int, scale: float, step: int) -> Tensor:
    """What `selectors.sampled` estimates, ``[heads, tiles, blocks]``.

    Args:
        q: queries ``[queries, heads, d]``, contiguous.
        cache: all keys up to the last query's.
        position: the first query's place among them.
        scale: of the logits.
        step: every how many queries one is looked at.
    """
    from trimtab.kernels.sparse import triton_prefill as kernels

    count, heads, _ = q.shape
    samples, blocks = -(-count // step), -(-(position + count) // TILE)
    how = tile("prefill_estimate", Need.of(q, q))
    logarithms = q.new_full((heads, samples, blocks), float("-inf"), dtype=torch.float32)
    grid = (-(-samples // how.rows), heads, -(-blocks // how.columns))
    kernels.block_logarithms[grid](
        *(q, cache.k, logarithms, cache.pages, position, count, samples, blocks, scale),
        *cache.strides,
        **cache.constants(q),
        **launched(how),
        STEP=step,
        ROWS=how.rows,
        PER_PROGRAM=how.columns,
    )
    by_sample = torch.softmax(logarithms.mul_(log(2)), -1)
    per_tile = TILE // step
    tiles = pad(by_sample, (0, 0, 0, -samples % per_tile)).unflatten(1, (-1, per_tile)).sum(2)
    shares: Tensor = tiles / tiles.sum(-1, keepdim=True)
    return shares


def attend(
    q: Tensor, cache: PagedCache, position: int, mask: Tensor, out: Tensor, scale: float
) -> None:
    """Causal attention of each head's tiles to their blocks, written into ``out``.

    Args:
        q: ``[queries, heads, d]``, contiguous.
        cache: all keys and values up to the last query's.
        position: the first query's place among them.
        mask: the blocks of each tile ``[heads, tiles, blocks]``.
        out: ``[queries, heads, d]``, contiguous.
        scale: of the logits.
    """
    from trimtab.kernels.sparse import triton_prefill as kernels

    how = tile("prefill", Need.of(q, q))
    lists = mask.byte().sort(dim=-1, descending=True, stable=True).indices.int()
    counts = mask.sum(-1, dtype=torch.int32)
    kernels.attend[(-(-q.shape[0] // how.rows), q.shape[1])](
        *(q, cache.k, cache.v, out, cache.pages, lists, counts, position, *q.shape[:1]),
        *(mask.shape[1], mask.shape[2], scale, *cache.strides),
        **cache.constants(q),
        **launched(how),
        ROWS=how.rows,
        KEYS=how.columns,
    )
