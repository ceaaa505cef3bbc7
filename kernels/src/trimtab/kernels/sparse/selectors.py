"""Which blocks a dense model's prefill needs: estimates of attention, and how many blocks to keep.

Tiles are 64 queries and blocks 64 keys, both from multiples of 64 in the sequence on, wherever a
call begins. An estimate tells the share of its attention that a tile, or a single query, has for
each block; `Selection` keeps the fewest blocks that hold a share of it, or a fixed number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import inf
from numbers import Real
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from trimtab.kernels.sparse.block_sparse import TILE, kept_blocks
from trimtab.kernels.sparse.checks import check_choice, check_numbers, check_total

By = Literal["tile", "query"]
"""Who chooses: the queries of a tile together, or each query by itself."""

Estimate = Callable[[Tensor, Tensor, int, float, By], Tensor]
"""From ``q [queries, heads, d]``, ``k [keys, kv_heads, d]``, the first query's position, the scale
and who chooses, to shares ``[heads, tiles or queries, blocks]``. Those of a tile add up to 1."""

_QUERY_STEP = 4
_POOL = 16
_STRIDE = 16
_LEAST = -1.0e30
SAMPLE_STEPS: Mapping[str, int] = {"mass": 8, "oracle": 1}
"""Selectors that look at whole queries, and at every how many where tiles choose."""


def sampled_positions(queries: int, position: int, step: int, device: torch.device) -> Tensor:
    """The last query of each ``step`` positions, and the last of all; the same in every chunk."""
    last = position + queries - 1
    steps = torch.arange(position // step, last // step + 1, device=device)
    return (steps * step + step - 1).clamp(max=last)


def tile_means(shares: Tensor, position: int, step: int) -> Tensor:
    """Means over the samples of each tile, ``[heads, tiles, blocks]``.

    Args:
        shares: ``[heads, samples, blocks]``, a sample for each ``step`` positions.
        position: the first query's.
        step: divides a tile.
    """
    before = position // step % (TILE // step)
    tiles = _in_groups(pad(shares.transpose(1, 2), (before, 0)), TILE // step).transpose(1, 2)
    means: Tensor = tiles / tiles.sum(-1, keepdim=True).clamp(min=1e-30)
    return means


def _shares(logits: Tensor, visible: Tensor, per_block: int) -> Tensor:
    """From logits ``[heads, samples, groups of keys]``, which it uses up, to shares of blocks.

    Samples that see nothing have zeros.
    """
    logits.masked_fill_(~visible, float("-inf"))
    top = logits.amax(-1, keepdim=True).clamp_(min=_LEAST)
    by_block = _in_groups(logits.sub_(top).exp_(), per_block)
    return by_block / by_block.sum(-1, keepdim=True).clamp(min=1e-30)


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


def _pools(k: Tensor) -> Tensor:
    """Groups of 16 neighbouring keys ``[pools, 16, kv_heads, d]``; zeros behind the last."""
    groups: Tensor = pad(k, (0, 0, 0, 0, 0, -k.shape[0] % _POOL)).unflatten(0, (-1, _POOL))
    return groups


def _of_pools(
    logits: Callable[[Tensor], Tensor], q: Tensor, pools: int, position: int, by: By
) -> Tensor:
    """Shares by logits of pools of 16 keys, of every fourth query where tiles choose.

    A single query sees pools that are whole before it: what is in one must not reach it sooner.
    """
    step = _QUERY_STEP if by == "tile" else 1
    at = sampled_positions(q.shape[0], position, step, q.device)
    begins = torch.arange(pools, device=q.device) * _POOL
    visible = begins + (0 if by == "tile" else _POOL - 1) <= at[:, None]
    shares = _shares(logits(q[at - position]), visible, TILE // _POOL)
    return tile_means(shares, position, step) if by == "tile" else shares


def pooled(q: Tensor, k: Tensor, position: int, scale: float, by: By = "tile") -> Tensor:
    """Queries against means of 16 keys: a hundredth of the work of attention for a tile."""
    means = _pools(k).mean(1)
    return _of_pools(lambda some: _logits(some, means, scale), q, means.shape[0], position, by)


def minmax(q: Tensor, k: Tensor, position: int, scale: float, by: By = "tile") -> Tensor:
    """Queries against what any of 16 keys could reach at most (Quest, arXiv 2406.10774)."""
    pools = _pools(k)
    absent = torch.arange(pools.shape[0] * _POOL, device=k.device) >= k.shape[0]
    absent = absent.view(-1, _POOL, 1, 1)
    most = pools.masked_fill(absent, float("-inf")).amax(1)
    least = pools.masked_fill(absent, float("inf")).amin(1)
    bounds = torch.cat([most, least], -1)

    def logits(some: Tensor) -> Tensor:
        return _logits(torch.cat([some.clamp(min=0), some.clamp(max=0)], -1), bounds, scale)

    return _of_pools(logits, q, pools.shape[0], position, by)


def antidiagonal(q: Tensor, k: Tensor, position: int, scale: float, by: By = "tile") -> Tensor:
    """Means of logits along antidiagonals of 16 by 16 squares (XAttention, arXiv 2503.16428)."""
    assert by == "tile"
    before = position % _STRIDE
    queries, keys = (
        pad(x, (0, 0, 0, 0, front, -(front + x.shape[0]) % _STRIDE)).unflatten(0, (-1, _STRIDE))
        for x, front in ((q, before), (k, 0))
    )
    folded_q, folded_k = (x.permute(0, 2, 1, 3).flatten(2) for x in (queries, keys.flip(1)))
    logits = _logits(folded_q, folded_k, scale / _STRIDE)
    ends = position - before + torch.arange(1, queries.shape[0] + 1, device=q.device) * _STRIDE
    begins = torch.arange(keys.shape[0], device=q.device) * _STRIDE
    shares = _shares(logits, begins < ends[:, None], TILE // _STRIDE)
    return tile_means(shares, position, _STRIDE)


def sampled(
    q: Tensor, k: Tensor, position: int, scale: float, by: By = "tile", *, step: int
) -> Tensor:
    """Every ``step``-th query against all keys; `TiledAttention.shares` is the same, compiled."""
    step = step if by == "tile" else 1
    at = sampled_positions(q.shape[0], position, step, q.device)
    visible = torch.arange(k.shape[0], device=q.device) <= at[:, None]
    shares = torch.cat(
        [
            _shares(_logits(q[at - position, h : h + 1], k[:, g : g + 1], scale), visible, TILE)
            for h, g in _heads(q, k)
        ]
    )
    return tile_means(shares, position, step) if by == "tile" else shares


def _heads(q: Tensor, k: Tensor) -> list[tuple[int, int]]:
    group = q.shape[1] // k.shape[1]
    return [(head, head // group) for head in range(q.shape[1])]


def evenly(q: Tensor, k: Tensor, position: int, scale: float, by: By = "tile") -> Tensor:
    """The same for each block that can be seen: for those who look at no numbers."""
    own = _own_blocks(q.shape[0], position, by, q.device)
    ids = torch.arange(-(-k.shape[0] // TILE), device=q.device)
    shares = (ids <= own[:, None]) / (own[:, None] + 1)
    return shares.expand(q.shape[1], -1, -1)


def _own_blocks(queries: int, position: int, by: By, device: torch.device) -> Tensor:
    """The block of each tile or query."""
    step = TILE if by == "tile" else 1
    return sampled_positions(queries, position, step, device) // TILE


Selector = Literal["mass", "pooled", "antidiagonal", "top", "minmax", "fixed", "oracle"]

ESTIMATES: Mapping[str, Estimate] = {
    "pooled": pooled,
    "antidiagonal": antidiagonal,
    "top": pooled,
    "minmax": minmax,
    "fixed": evenly,
    **{name: partial(sampled, step=step) for name, step in SAMPLE_STEPS.items()},
}
"""The estimate behind each selector; the oracle's is attention itself, at attention's price."""

COUNTED = ("top", "minmax")
"""Selectors that keep a number of blocks, not a share of the estimate."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which blocks are kept of an estimate; always the first ones and the latest.

    Raises:
        ValueError: the options do not go together.
    """

    selector: Selector = "mass"
    mass: float = 0.97
    """Share of the estimated attention that the kept blocks hold, all of them at 1; not for
    `COUNTED`."""
    top: int = 16
    """Blocks that `COUNTED` keep, forced ones included."""
    first: int = 1
    recent: int = 2
    stride: int = 0
    """``fixed`` also keeps each block whose number is a multiple of it; 0 is none."""
    by: By = "tile"
    """``tile``: a query may see blocks that later ones of its tile have chosen. ``query``: what it
    sees depends on itself and the keys before it alone."""

    def __post_init__(self) -> None:
        check_choice("selector", self.selector, Selector)
        check_choice("by", self.by, By)
        check_numbers(0, first=self.first, recent=self.recent, stride=self.stride)
        check_numbers(1, top=self.top)
        if not isinstance(self.mass, Real) or not 0 < self.mass <= 1:
            raise ValueError(f"mass is {self.mass!r}; give a share above 0, and at most 1")
        if self.selector in COUNTED:
            check_total(self.top, self.first, self.recent)
        if self.stride and self.selector != "fixed":
            raise ValueError(f"stride {self.stride} is for the selector fixed, not {self.selector}")
        if self.by == "query" and self.selector == "antidiagonal":
            raise ValueError(
                "antidiagonals go through 16 queries, and no query can choose blocks by itself;"
                " give another selector than 'antidiagonal', or by='tile'"
            )

    @property
    def share(self) -> float:
        """`mass`, or where that is all, more than rounded shares ever add up to."""
        return self.mass if self.mass < 1 else inf

    def describe(self) -> str:
        """A few words for logs."""
        amount = f"{self.selector} {self.mass:g}"
        if self.selector in COUNTED:
            amount = f"{self.selector} {self.top}"
        elif self.selector == "fixed":
            amount = f"fixed {self.first} and {self.recent}"
            amount += f" and every {self.stride}th" if self.stride else ""
        return amount + (" by query" if self.by == "query" else "")

    @property
    def sample_step(self) -> int | None:
        """Every how many queries one is looked at whole; None where none is."""
        step = SAMPLE_STEPS.get(self.selector)
        return step if step is None or self.by == "tile" else 1

    def estimate(self, q: Tensor, k: Tensor, position: int, scale: float) -> Tensor:
        """Shares ``[heads, tiles or queries, blocks]`` in plain torch.

        Args:
            q: queries of one sequence ``[queries, heads, d]``.
            k: all its keys up to the last query's ``[keys, kv_heads, d]``.
            position: the first query's place among them.
            scale: of the logits.
        """
        return ESTIMATES[self.selector](q, k, position, scale, self.by)

    def keep(self, shares: Tensor, position: int, queries: int) -> Tensor:
        """The blocks of each tile or query, a mask as large as ``shares``.

        Args:
            shares: an estimate ``[heads, tiles or queries, blocks]``.
            position: the first query's place among the keys.
            queries: how many there are.
        """
        own = _own_blocks(queries, position, self.by, shares.device)
        kept = None
        if self.selector != "fixed":
            top = self.top if self.selector in COUNTED else 0
            kept = kept_blocks(
                shares, own, first=self.first, recent=self.recent, top=top, mass=self.share
            )
        return self.keep_in_torch(shares, own) if kept is None else kept

    def keep_in_torch(self, shares: Tensor, own: Tensor) -> Tensor:
        """What `keep` does, for rows whose last visible blocks are ``own [rows]``."""
        ids, own = torch.arange(shares.shape[-1], device=shares.device), own[:, None]
        visible = ids <= own
        forced = visible & ((ids < self.first) | (ids > own - self.recent))
        if self.selector == "fixed":
            kept = forced | (visible & (ids % self.stride == 0)) if self.stride else forced
            return kept.expand_as(shares)
        # Blocks that cannot be seen have no share, and come last.
        ranked = shares.masked_fill(forced, 2.0).sort(dim=-1, descending=True, stable=True)
        if self.selector in COUNTED:
            keep = (ids < self.top).expand_as(shares)
        else:
            held = shares.gather(-1, ranked.indices).cumsum(-1)
            keep = pad(held[..., :-1], (1, 0)) < self.share
        chosen = torch.zeros_like(keep).scatter(-1, ranked.indices, keep)
        return (chosen | forced) & visible

    def segments(
        self, queries: int, heads: int, position: int, estimate_bytes: int
    ) -> Iterator[slice]:
        """Queries of whole tiles whose estimate, and what is made of it, fits.

        Args:
            queries: how many there are.
            heads: their heads.
            position: the first query's place among the keys.
            estimate_bytes: what one number for each of its samples and blocks may take.
        """
        blocks = -(-(position + queries) // TILE)
        step = self.sample_step or 1
        size = max(TILE, estimate_bytes // (4 * heads * blocks) * step // TILE * TILE)
        begins = range(position // TILE * TILE, position + queries, size)
        for begin in begins:
            yield slice(max(0, begin - position), min(queries, begin - position + size))
