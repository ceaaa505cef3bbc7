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

from trimtab.kernels.sparse.block_sparse import TILE, query_bits
from trimtab.kernels.sparse.gpu_tiles import Need, tile
from trimtab.kernels.sparse.launch import Attempt, launched, of_keys
from trimtab.kernels.sparse.prefill import visible_blocks
from trimtab.kernels.sparse.selectors import By, Selection, tile_means

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
        ValueError: heads are larger than any tile, or the cache has too few pages.
    """
    room = cache.pages.numel() * cache.k.shape[2]
    if position < 0 or position + q.shape[0] > room:
        raise ValueError(
            f"{q.shape[0]} queries from position {position} on do not fit the {room} places of the"
            " request's pages; give a position from 0 on, and all its pages"
        )
    q = q.contiguous()
    written = out if out.is_contiguous() else torch.empty_like(q)
    step, by = selection.sample_step, selection.by
    keys = cache.keys(position + q.shape[0]) if step is None else None
    kept: list[Tensor] = []
    visible = 0
    for rows in segments(q.shape[0], q.shape[1], position, selection):
        part, begin = q[rows], position + rows.start
        if step is not None:
            shares = block_shares(part, cache, begin, scale, step, by)
        elif keys is not None:
            shares = selection.estimate(part, keys[: begin + part.shape[0]], begin, scale)
        mask = selection.keep(shares, begin, part.shape[0])
        attend(part, cache, begin, mask, written[rows], scale, by)
        kept.append(mask.sum())
        visible += q.shape[1] * visible_blocks(begin, part.shape[0], by)
    if written is not out:
        out.copy_(written)
    return torch.stack(kept).sum() / visible


def segments(queries: int, heads: int, position: int, selection: Selection) -> Iterator[slice]:
    """Whole tiles of queries whose estimate fits `ESTIMATE_BYTES`.

    Args:
        queries: how many there are.
        heads: their heads.
        position: the first query's place among the keys.
        selection: which blocks are kept.
    """
    yield from selection.segments(queries, heads, position, ESTIMATE_BYTES)


def block_shares(
    q: Tensor, cache: PagedCache, position: int, scale: float, step: int, by: By = "tile"
) -> Tensor:
    """What `selectors.sampled` estimates, ``[heads, tiles or queries, blocks]``.

    Args:
        q: queries ``[queries, heads, d]``, contiguous.
        cache: all keys up to the last query's.
        position: the first query's place among them.
        scale: of the logits.
        step: every how many queries one is looked at, 1 where queries choose.
        by: who chooses.
    """
    from trimtab.kernels.sparse import triton_prefill as kernels

    count, heads, _ = q.shape
    samples = (position + count - 1) // step - position // step + 1
    blocks = -(-(position + count) // TILE)
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
    return tile_means(by_sample, position, step) if by == "tile" else by_sample


def attend(
    q: Tensor,
    cache: PagedCache,
    position: int,
    mask: Tensor,
    out: Tensor,
    scale: float,
    by: By = "tile",
) -> None:
    """Causal attention of each head's tiles or queries to their blocks, written into ``out``.

    Args:
        q: ``[queries, heads, d]``, contiguous.
        cache: all keys and values up to the last query's.
        position: the first query's place among them.
        mask: their blocks ``[heads, tiles or queries, blocks]``.
        out: ``[queries, heads, d]``, contiguous.
        scale: of the logits.
        by: who chose.
    """
    from trimtab.kernels.sparse import triton_prefill as kernels

    bits = query_bits(mask, position) if by == "query" else None
    how = tile("prefill" if bits is None else "prefill_by_query", Need.of(q, q))
    # The kernel's tiles begin at the first query, which so must be that of a block.
    before = position % TILE
    given, written = q, out
    if before:
        given = pad(q, (0, 0, 0, 0, before, 0))
        written = torch.empty_like(given)
    of_tiles = mask if bits is None else bits != 0
    lists = of_tiles.byte().sort(dim=-1, descending=True, stable=True).indices.int()
    counts = of_tiles.sum(-1, dtype=torch.int32)
    grid = (-(-given.shape[0] // how.rows), q.shape[1])
    for attempt in Attempt.both(grid, how, q):
        kernels.attend[attempt.grid](
            *(given, cache.k, cache.v, written, cache.pages, lists, counts),
            *(lists if bits is None else bits, attempt.odd, position - before, *given.shape[:1]),
            *(of_tiles.shape[1], of_tiles.shape[2], scale, *cache.strides),
            **cache.constants(q),
            **launched(attempt.how),
            ROWS=how.rows,
            KEYS=attempt.how.columns,
            BY_QUERY=bits is not None,
            AGAIN=attempt.again,
        )
    if before:
        out.copy_(written[before:])
