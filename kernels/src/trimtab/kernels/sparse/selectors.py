"""Which blocks a dense model's prefill needs: estimates of attention, and how many blocks to keep.

An estimate gives each tile of 64 queries and head the share of its attention that falls on each
block of 64 keys. `Selection` keeps the fewest blocks that hold a share of it, or a fixed number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from trimtab.kernels.sparse.block_sparse import TILE

Estimate = Callable[[Tensor, Tensor, int, float], Tensor]
"""From ``q [queries, heads, d]``, ``k [keys, kv_heads, d]``, the first query's position and the
scale to shares ``[heads, tiles, blocks]`` whose last dimension adds up to 1."""

_QUERY_STEP = 4
_POOL = 16
_STRIDE = 16
SAMPLE_STEPS: Mapping[str, int] = {"mass": 8, "oracle": 1}
"""Selectors that look at whole queries, and at every how many."""


def _shares(logits: Tensor, visible: Tensor, per_block: int, rows: int) -> Tensor:
    """From logits ``[heads, samples, groups of keys]``, which it uses up, to mean shares.

    Every sample must see something.
    """
    logits.masked_fill_(~visible, float("-inf"))
    by_block = _in_groups(logits.sub_(logits.amax(-1, keepdim=True)).exp_(), per_block)
    by_block /= by_block.sum(-1, keepdim=True)
    tiles = _in_groups(by_block.transpose(1, 2), rows).transpose(1, 2)
    shares: Tensor = tiles / tiles.sum(-1, keepdim=True).clamp(min=1e-30)
    return shares


def _in_groups(x: Tensor, size: int) -> Tensor:
    """Sums of neighbours along the last dimension; what the last group lacks counts as 0."""
    short = -x.shape[-1] % size
    whole = pad(x, (0, short)) if short else x
    sums: Tensor = whole.unflatten(-1, (-1, size)).sum(-1)
    return sums


def _by_head(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """``[kv_heads, group * queries, d]`` and ``[kv_heads, d, keys]``, for one product a KV head."""
    group = q.shape[1] // k.shape[1]
    queries = q.unflatten(1, (k.shape[1], group)).permute(1, 2, 0, 3).flatten(1, 2)
    return queries, k.permute(1, 2, 0)


def _logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    queries, keys = _by_head(q, k)
    logits: Tensor = (queries @ keys).float().unflatten(1, (-1, q.shape[0])).flatten(0, 1)
    return logits.mul_(scale)


def pooled(q: Tensor, k: Tensor, position: int, scale: float) -> Tensor:
    """Every fourth query against means of 16 keys: a hundredth of the work of attention."""
    means = pad(k, (0, 0, 0, 0, 0, -k.shape[0] % _POOL)).unflatten(0, (-1, _POOL)).mean(1)
    at = position + torch.arange(0, q.shape[0], _QUERY_STEP, device=q.device)
    begins = torch.arange(means.shape[0], device=q.device) * _POOL
    logits = _logits(q[::_QUERY_STEP], means, scale)
    return _shares(logits, begins <= at[:, None], TILE // _POOL, TILE // _QUERY_STEP)


def antidiagonal(q: Tensor, k: Tensor, position: int, scale: float) -> Tensor:
    """Means of logits along antidiagonals of 16 by 16 squares (XAttention, arXiv 2503.16428)."""
    queries = pad(q, (0, 0, 0, 0, 0, -q.shape[0] % _STRIDE)).unflatten(0, (-1, _STRIDE))
    keys = pad(k, (0, 0, 0, 0, 0, -k.shape[0] % _STRIDE)).unflatten(0, (-1, _STRIDE)).flip(1)
    folded_q, folded_k = (x.permute(0, 2, 1, 3).flatten(2) for x in (queries, keys))
    logits = _logits(folded_q, folded_k, scale / _STRIDE)
    at = position + torch.arange(queries.shape[0], device=q.device) * _STRIDE + _STRIDE - 1
    begins = torch.arange(keys.shape[0], device=q.device) * _STRIDE
    return _shares(logits, begins <= at[:, None], TILE // _STRIDE, TILE // _STRIDE)


def sampled(q: Tensor, k: Tensor, position: int, scale: float, *, step: int) -> Tensor:
    """Every ``step``-th query against all keys; `TiledAttention.shares` is the same, compiled."""
    at = position + torch.arange(step - 1, q.shape[0] + step - 1, step).clamp(max=q.shape[0] - 1)
    visible = torch.arange(k.shape[0]) <= at[:, None]
    parts = [
        _shares(
            _logits(q[at - position, h : h + 1], k[:, g : g + 1], scale),
            visible,
            TILE,
            TILE // step,
        )
        for h, g in _heads(q, k)
    ]
    return torch.cat(parts)


def _heads(q: Tensor, k: Tensor) -> list[tuple[int, int]]:
    group = q.shape[1] // k.shape[1]
    return [(head, head // group) for head in range(q.shape[1])]


ESTIMATES: Mapping[str, Estimate] = {
    "pooled": pooled,
    "antidiagonal": antidiagonal,
    "top": pooled,
    **{name: partial(sampled, step=step) for name, step in SAMPLE_STEPS.items()},
}
"""The estimate behind each selector; the oracle's is attention itself, at attention's price."""


@dataclass(frozen=True, slots=True)
class Selection:
    """How many blocks each tile keeps of an estimate; always the first ones and the latest."""

    selector: Literal["mass", "pooled", "antidiagonal", "top", "oracle"] = "mass"
    mass: float = 0.97
    """Share of the estimated attention that the kept blocks hold; not for ``top``."""
    top: int = 16
    """Blocks that ``top`` keeps."""
    first: int = 1
    recent: int = 2

    def estimate(self, q: Tensor, k: Tensor, position: int, scale: float) -> Tensor:
        """Shares ``[heads, tiles, blocks]`` in plain torch.

        Args:
            q: queries of one sequence ``[queries, heads, d]``.
            k: all its keys up to the last query's ``[keys, kv_heads, d]``.
            position: the first query's place among them.
            scale: of the logits.
        """
        return ESTIMATES[self.selector](q, k, position, scale)

    def keep(self, shares: Tensor, position: int, queries: int) -> Tensor:
        """The blocks of each tile, a mask as large as ``shares``.

        Args:
            shares: an estimate ``[heads, tiles, blocks]``.
            position: the first query's place among the keys.
            queries: how many there are, the last of them at the last key.
        """
        ids = torch.arange(shares.shape[-1], device=shares.device)
        begin = torch.arange(0, shares.shape[1] * TILE, TILE, device=shares.device)[:, None]
        begin += position
        own = (begin + TILE - 1).clamp(max=position + queries - 1) // TILE
        forced = (ids < self.first) | (ids > begin // TILE - self.recent)
        ranked = shares.masked_fill(forced, 2.0).sort(dim=-1, descending=True, stable=True)
        if self.selector == "top":
            keep = (ids < self.top).expand_as(shares)
        else:
            sorted_shares = shares.gather(-1, ranked.indices)
            before = sorted_shares.cumsum(-1) - sorted_shares
            keep = before < self.mass
        chosen = torch.zeros_like(keep).scatter(-1, ranked.indices, keep)
        return (chosen | forced) & (ids <= own)
