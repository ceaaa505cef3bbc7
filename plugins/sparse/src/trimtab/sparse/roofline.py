"""How long each sparse kernel should take on a GPU, from what it must compute and move.

A kernel takes as long as its products at the share of the peak that dense attention by Triton was
published to reach, as its memory traffic at three quarters of the bandwidth, or as what it reads
again from the L2 cache, whichever is longest.
Nothing here is fitted to our kernels; `trimtab bench sparse-gpu` tells how far off it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from trimtab.core.devices import DeviceProfile
from trimtab.kernels.sparse import SparseShape
from trimtab.kernels.sparse.selected_plan import FORCED, plan_selected
from trimtab.kernels.sparse.selectors import SAMPLE_STEPS

LAUNCH_S = 5e-6
L2_BYTES_PER_S = 5.6e12
"""An H100's, from a kernel of vanilla NSA's that does little else."""
_MEMORY_SHARE = 0.75
_LARGE_PEAK = 500e12
_TENSOR_SHARES = (0.31, 0.6)
"""Of the peak, for GPUs above `_LARGE_PEAK` and below: Triton's dense attention takes 228 ms for
64K tokens and 64 heads on an H100 (native-sparse-attention-triton), and 2.6 s for 128K on an H20
(FSA, table 6)."""
_CHUNK_ROWS = 2048
"""Rows that one program of the backward takes, and writes one sum of keys and values for."""
_FLASH_GAIN = 1.22
"""FlashAttention's speed over Triton's in the same place: 187 ms."""


@dataclass(frozen=True)
class Sizes:
    """What is run: one sequence, all of whose tokens are queries."""

    tokens: int
    heads: int
    kv_heads: int
    d: int
    d_v: int
    dtype: torch.dtype
    shape: SparseShape

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.kv_heads

    @property
    def item(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    @property
    def rows(self) -> float:
        """Queries times heads."""
        return float(self.tokens * self.heads)

    @property
    def chosen(self) -> float:
        """Queries times heads times blocks that each has chosen."""
        return self.rows * min(self.shape.top, -(-self.tokens // self.shape.block))

    @property
    def early(self) -> int:
        """Tokens whose queries call all blocks near (`trimtab.kernels.sparse.triton_near`)."""
        plan = plan_selected(self.group, self.d, self.d_v, self.shape.block, self.item)
        return min(self.tokens, plan.dense_until(self.shape.top, self.shape.block))

    @property
    def far(self) -> float:
        """Queries times heads times blocks that each has chosen and does not call near."""
        return float(self.heads * (self.tokens - self.early) * max(0, self.shape.top - FORCED))


@dataclass(frozen=True)
class Demand:
    """What a kernel must do."""

    flop: float
    memory_bytes: float
    cache_bytes: float = 0.0
    """Read again and again from the L2 cache."""


def _pairs(of: Sizes, seen: float, products: int, wide: int) -> Demand:
    """Queries that see so many keys each, in so many products of ``d`` and of ``d_v``."""
    flop = 2.0 * of.rows * seen * (products * of.d + wide * of.d_v)
    keys = of.tokens * of.kv_heads * (of.d + of.d_v)
    return Demand(flop, of.item * ((products + wide) / 2 * of.rows * (of.d + of.d_v) / 2 + keys))


def _causal(of: Sizes) -> float:
    return of.tokens / 2


def _entries(of: Sizes) -> float:
    return of.shape.entries(of.tokens) / 2


def _selected(of: Sizes, rows: float, products: int, wide: int, moved: int) -> Demand:
    """A pass over blocks: bytes that are read and written for each row, which has one block."""
    flop = 2.0 * rows * of.shape.block * (products * of.d + wide * of.d_v)
    return Demand(flop, rows * (moved + 8))


def _merge(of: Sizes, part_bytes: int) -> Demand:
    return Demand(0.0, of.chosen * (part_bytes + 8) + of.rows * (of.item * of.d_v + 4))


def _near(of: Sizes) -> Demand:
    """Early queries attend to all before them, later ones to their near blocks; and the parts."""
    keys = of.early**2 / 2 + (of.tokens - of.early) * FORCED * of.shape.block
    queries = of.rows * (of.item * (of.d + of.d_v) + 4)
    parts = of.far * (of.item * of.d_v + 8)
    return Demand(2.0 * of.heads * keys * (of.d + of.d_v), queries + parts)


def _by_query(of: Sizes) -> Demand:
    """Each query reads its blocks for a whole group, which takes 16 rows of a tile or more."""
    blocks = of.chosen / of.group
    flop = 2.0 * blocks * max(16, of.group) * of.shape.block * (of.d + of.d_v)
    read = blocks * of.shape.block * (of.d + of.d_v) * of.item
    return Demand(flop, of.rows * (of.item * (of.d + of.d_v) + 4), read)


def _best_blocks(of: Sizes) -> Demand:
    taps = len(of.shape.weights) / of.shape.entries_per_block
    return _pairs(of, _entries(of) * taps, 1, 0)


def _spans(products: int, wide: int) -> Callable[[Sizes, float], Demand]:
    return lambda of, seen: _pairs(of, seen, products, wide)


KERNELS: Mapping[str, Callable[[Sizes], Demand]] = {
    "forward": lambda of: _selected(of, of.far, 1, 1, of.item * (of.d + of.d_v)),
    "near_and_join": _near,
    "far": lambda of: Demand(0.0, of.chosen / of.group * 16),
    "by_query": _by_query,
    "backward": lambda of: _selected(of, of.chosen, 3, 2, of.item * (of.d + of.d_v) + 4 * of.d),
    "add_chunks": lambda of: Demand(
        0.0, of.chosen / _CHUNK_ROWS * of.shape.block * 8 * (of.d + of.d_v)
    ),
    "sum_parts": lambda of: Demand(0.0, of.chosen * 4 * of.d + of.rows * of.item * of.d),
    "entry_logarithms": lambda of: _pairs(of, _entries(of), 1, 0),
    "best_blocks": _best_blocks,
    "prefill_estimate": lambda of: _pairs(of, _causal(of) / SAMPLE_STEPS["mass"], 1, 0),
    "published_maxima": lambda of: _selected(of, of.chosen, 1, 0, of.item * of.d),
    "published_forward": lambda of: _selected(of, of.chosen, 1, 1, of.item * of.d + 4 * of.d_v),
    "published_merge": lambda of: _merge(of, 4 * of.d_v),
}
"""Those whose work follows from the sizes alone; `SPANS` are told what their queries see."""

SPANS: Mapping[str, Callable[[Sizes, float], Demand]] = {
    "span": _spans(1, 1),
    "span_dq": _spans(2, 1),
    "span_dkv": _spans(2, 2),
    "prefill": _spans(1, 1),
    "prefill_by_query": _spans(1, 1),  # and as much again as its tile's other queries have chosen
    "dense": _spans(1, 1),
    "dense_backward": _spans(3, 2),
}


def seconds(demand: Demand, profile: DeviceProfile, dtype: torch.dtype, gain: float = 1.0) -> float:
    """How long a kernel takes.

    Args:
        demand: its work.
        profile: the GPU.
        dtype: of its operands.
        gain: its speed over Triton's dense attention on the same products.

    Raises:
        BadInput: the GPU has no products of this type.
    """
    known = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    peak = profile.flop_per_s(known[dtype])  # type: ignore[arg-type]
    share = _TENSOR_SHARES[0] if peak > _LARGE_PEAK else _TENSOR_SHARES[1]
    memory_s = demand.memory_bytes / (_MEMORY_SHARE * profile.memory_bandwidth_bytes_per_s)
    cache_s = demand.cache_bytes / L2_BYTES_PER_S
    return max(demand.flop / (peak * share * gain), memory_s, cache_s) + LAUNCH_S


def dense_s(of: Sizes, profile: DeviceProfile, *, backward: bool = False) -> float:
    """Of dense causal flash attention as torch has it."""
    demand = SPANS["dense_backward" if backward else "dense"](of, _causal(of))
    return seconds(demand, profile, of.dtype, _FLASH_GAIN)


def kernel_s(name: str, of: Sizes, seen: float, profile: DeviceProfile) -> float | None:
    """Of one kernel, or None where no work is told for it.

    Args:
        name: by `trimtab.kernels.sparse.configurations.KERNELS`.
        of: the sizes.
        seen: keys that a query sees on average, for kernels of spans.
        profile: the GPU.
    """
    if name in KERNELS:
        return seconds(KERNELS[name](of), profile, of.dtype)
    if name in SPANS:
        return seconds(SPANS[name](of, seen), profile, of.dtype)
    return None
