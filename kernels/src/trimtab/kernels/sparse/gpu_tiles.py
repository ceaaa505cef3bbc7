"""How each GPU kernel is launched: the tiles that neither spill nor need more than a GPU has.

`static_report` compiles them all, and a test fails where one spills. They were chosen so, without a
GPU: nobody has timed them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class Tile:
    """How a kernel is launched: rows and columns of its tile, warps, and stages of its pipeline."""

    rows: int
    warps: int
    stages: int
    columns: int = 0
    """Keys or entries of a tile, where these are no blocks; of an estimate, blocks of a program."""
    tiles: int = 8
    """What a program of the selected branch takes at most of a block's queries; it reads its keys
    once, and a chain of more than that would keep others waiting."""
    second: Tile | None = None
    """Of the launch for what is odd (`launch.Attempt`), of as many rows; without a pipeline, but
    the same else, by default."""

    @property
    def chunk(self) -> int:
        """Rows of a program of the selected branch at most."""
        return self.rows * self.tiles

    def again(self) -> Tile:
        """The tile for what is odd, which happens rarely and keeps more in registers."""
        return self.second or replace(self, stages=1)


def power_of_two(size: int) -> int:
    """The least that is not below a size."""
    return 1 << (size - 1).bit_length()


def padded(size: int) -> int:
    """The power of two, at least 16, that a tile needs for a dimension."""
    return max(16, power_of_two(size))


def merge_tile(group: int, width: int) -> Tile:
    """The tile that joins the parts of one query's group, whose values are so wide."""
    large = power_of_two(group) * padded(width) >= 4096
    return Tile(rows=1, warps=8 if large else 4, stages=3)


def slots_at_once(top: int) -> int:
    """How many of a query's blocks the kernel of near ones holds in its registers."""
    return min(32, padded(top))


def choice_tile(how: Tile, need: Need, kept: int) -> Tile:
    """The tile that keeps so many best blocks of each query, for that of the same queries."""
    return replace(how, warps=max(how.warps, 8)) if kept > 32 and need.backend == "cuda" else how


@dataclass(frozen=True, slots=True)
class Need:
    """What decides about a kernel's tile."""

    backend: str
    """``cuda`` or ``hip``."""
    width: int
    """Padded dimensions of keys and values, added up."""
    item_bytes: int
    """Of queries, keys and values."""

    @classmethod
    def of(cls, q: torch.Tensor, v: torch.Tensor) -> Need:
        """What these tensors need on the GPUs that torch was built for."""
        backend = "hip" if torch.version.hip else "cuda"
        width = padded(q.shape[-1]) + padded(v.shape[-1])
        return cls(backend, width, q.element_size())


@dataclass(frozen=True, slots=True)
class Rule:
    """A tile for all that is at most so wide, in blocks of at most so many tokens."""

    width: int
    tile: Tile
    block: int = 0
    """0 for kernels that know no blocks."""


_MAIN: Mapping[tuple[str, int], tuple[Rule, ...]] = {
    ("cuda", 2): (
        Rule(384, Tile(64, 4, 2), 64),
        Rule(256, Tile(64, 8, 1), 128),
        Rule(512, Tile(32, 8, 2), 64),
        Rule(384, Tile(32, 4, 1), 128),
        Rule(512, Tile(32, 8, 1), 128),
    ),
    ("cuda", 4): (
        Rule(128, Tile(32, 8, 1), 64),
        Rule(256, Tile(32, 8, 1), 32),
        Rule(512, Tile(16, 8, 1), 32),
    ),
    ("hip", 2): (
        Rule(384, Tile(64, 4, 2), 64),
        Rule(256, Tile(64, 4, 1), 128),
        Rule(512, Tile(32, 4, 2), 64),
        Rule(512, Tile(16, 4, 1), 128),
    ),
    ("hip", 4): (Rule(256, Tile(32, 4, 2), 64), Rule(512, Tile(16, 4, 1), 64)),
}
"""Of the selected branch forward, ours and as published, by backend and bytes of an item."""

_SPAN: Mapping[tuple[str, int], tuple[Rule, ...]] = {
    ("cuda", 2): (
        Rule(256, Tile(64, 4, 2, 64, second=Tile(64, 8, 1, 64))),
        Rule(384, Tile(32, 4, 2, 64, second=Tile(32, 8, 1, 64))),
        Rule(512, Tile(64, 8, 2, 32)),
    ),
    ("cuda", 4): (
        Rule(128, Tile(32, 4, 2, 32)),
        Rule(256, Tile(16, 8, 1, 32, second=Tile(16, 4, 2, 32))),
        Rule(384, Tile(32, 8, 1, 32)),
        Rule(512, Tile(16, 8, 1, 16)),
    ),
    ("hip", 2): (Rule(256, Tile(64, 4, 2, 64)), Rule(512, Tile(64, 4, 2, 32))),
    ("hip", 4): (Rule(256, Tile(32, 4, 2, 32)), Rule(512, Tile(32, 4, 1, 32))),
}
"""Of neighbouring keys, and most of those of near blocks."""

_ANY = 1 << 30
_RULES: Mapping[tuple[str, str, int], tuple[Rule, ...]] = {
    **{(kernel, *of): rules for kernel in ("forward", "published") for of, rules in _MAIN.items()},
    ("by_query", "cuda", 2): (Rule(384, Tile(16, 4, 2), 64), Rule(512, Tile(16, 8, 2), 64)),
    ("by_query", "cuda", 4): (Rule(256, Tile(16, 8, 1), 32), Rule(512, Tile(16, 8, 1), 16)),
    ("by_query", "hip", 2): (Rule(512, Tile(16, 4, 1), 64),),
    ("by_query", "hip", 4): (Rule(512, Tile(16, 4, 1), 32),),
    ("published", "cuda", 2): (Rule(384, Tile(64, 8, 2), 64), *_MAIN["cuda", 2][1:]),
    ("backward", "cuda", 2): (
        Rule(256, Tile(32, 8, 2, tiles=64), 64),
        Rule(512, Tile(16, 8, 1, tiles=128), 64),
    ),
    ("backward", "cuda", 4): (
        Rule(128, Tile(16, 8, 1, tiles=128), 64),
        Rule(256, Tile(16, 8, 1, tiles=128), 16),
    ),
    ("backward", "hip", 2): (
        Rule(256, Tile(32, 4, 1, tiles=64), 64),
        Rule(384, Tile(16, 4, 1, tiles=128), 64),
        Rule(512, Tile(16, 4, 1, tiles=128), 32),
    ),
    ("backward", "hip", 4): (
        Rule(128, Tile(16, 4, 1, tiles=128), 64),
        Rule(256, Tile(16, 4, 1, tiles=128), 32),
        Rule(512, Tile(16, 4, 1, tiles=128), 16),
    ),
    ("select", "cuda", 2): (
        Rule(256, Tile(32, 4, 2, 64), _ANY),
        Rule(512, Tile(32, 4, 1, 64), _ANY),
    ),
    ("select", "cuda", 4): (
        Rule(128, Tile(32, 8, 1, 32), _ANY),
        Rule(256, Tile(32, 8, 1, 16), _ANY),
        Rule(512, Tile(32, 8, 1, 32), _ANY),
    ),
    ("select", "hip", 2): (Rule(512, Tile(32, 4, 2, 64), _ANY),),
    ("select", "hip", 4): (
        Rule(256, Tile(32, 4, 2, 64), _ANY),
        Rule(512, Tile(32, 8, 2, 32), _ANY),
    ),
    **{
        ("far", backend, item_bytes): (Rule(_ANY, Tile(64, 4, 1)),) for backend, item_bytes in _MAIN
    },
    **{(kernel, *of): rules for kernel in ("span", "near") for of, rules in _SPAN.items()},
    ("near", "cuda", 2): (
        Rule(128, Tile(64, 4, 1, 64, second=Tile(64, 8, 1, 32))),
        *_SPAN["cuda", 2],
    ),
    ("near", "cuda", 4): (
        Rule(128, Tile(16, 8, 1, 16)),
        Rule(256, Tile(32, 8, 1, 16)),
        Rule(384, Tile(16, 4, 1, 16, second=Tile(16, 4, 2, 16))),
        Rule(512, Tile(16, 8, 2, 16)),
    ),
    ("prefill", "cuda", 2): (
        Rule(128, Tile(64, 4, 2, 64)),
        Rule(256, Tile(64, 8, 2, 64)),
        Rule(512, Tile(64, 8, 2, 32)),
    ),
    **{
        (kernel, "cuda", 4): (
            Rule(128, Tile(32, 4, 2, 32)),
            Rule(256, Tile(16, 8, 1, 32, second=Tile(16, 8, 1, 16))),
            Rule(512, Tile(16, 8, 1, 32, second=Tile(16, 8, 2, 32))),
        )
        for kernel in ("prefill", "prefill_by_query")
    },
    ("prefill", "hip", 2): (Rule(256, Tile(64, 4, 2, 64)), Rule(512, Tile(64, 4, 2, 32))),
    ("prefill", "hip", 4): (Rule(256, Tile(32, 4, 2, 32)), Rule(512, Tile(32, 4, 1, 32))),
    ("prefill_by_query", "cuda", 2): (Rule(256, Tile(64, 8, 2, 64)), Rule(512, Tile(32, 4, 2, 32))),
    ("prefill_by_query", "hip", 2): (Rule(256, Tile(64, 4, 2, 64)), Rule(512, Tile(64, 4, 2, 32))),
    ("prefill_by_query", "hip", 4): (Rule(256, Tile(32, 4, 2, 32)), Rule(512, Tile(32, 4, 1, 32))),
    ("prefill_estimate", "cuda", 2): (Rule(512, Tile(64, 4, 2, 16)),),
    ("prefill_estimate", "cuda", 4): (Rule(512, Tile(32, 8, 1, 16)),),
    ("prefill_estimate", "hip", 2): (Rule(512, Tile(64, 4, 2, 16)),),
    ("prefill_estimate", "hip", 4): (Rule(512, Tile(32, 4, 1, 16)),),
    ("span_backward", "cuda", 2): (
        Rule(128, Tile(32, 4, 2, 32)),
        Rule(384, Tile(32, 4, 1, 32, second=Tile(32, 8, 1, 32))),
        Rule(512, Tile(32, 8, 1, 32)),
    ),
    ("span_backward", "cuda", 4): (
        Rule(128, Tile(32, 8, 1, 32)),
        Rule(256, Tile(16, 8, 1, 32, second=Tile(16, 4, 2, 32))),
        Rule(384, Tile(16, 8, 1, 16)),
    ),
    ("span_backward", "hip", 2): (Rule(512, Tile(32, 4, 1, 32)),),
    ("span_backward", "hip", 4): (Rule(256, Tile(32, 4, 1, 32)), Rule(512, Tile(32, 4, 1, 16))),
}
"""By kernel, backend and bytes of an item, the narrower and the larger blocks first."""

IN_TORCH_TOO = ("backward", "span_backward")
"""Kernels whose launchers take the way in torch where no tile fits."""


def has_tile(kernel: str, need: Need) -> bool:
    """Whether there is a tile for heads so wide."""
    return any(need.width <= rule.width for rule in _RULES[kernel, need.backend, need.item_bytes])


def _rules(kernel: str, need: Need) -> list[Rule]:
    rules = _RULES[kernel, need.backend, need.item_bytes]
    found = [rule for rule in rules if need.width <= rule.width]
    if not found:
        raise ValueError(
            f"heads are {need.width} wide, keys and values together; on a GPU {kernel} takes"
            f" {rules[-1].width} at most with {need.item_bytes} bytes a number"
        )
    return found


def fit_block(kernel: str, need: Need, block: int) -> int:
    """The largest block not above ``block`` that a kernel has a tile for."""
    return min(block, max(rule.block for rule in _rules(kernel, need)))


def tile(kernel: str, need: Need, block: int = 0) -> Tile:
    """The tile of a kernel; ``block`` is at most what `fit_block` says.

    Raises:
        ValueError: heads are wider than any tile.
    """
    return next(rule.tile for rule in _rules(kernel, need) if block <= rule.block)
