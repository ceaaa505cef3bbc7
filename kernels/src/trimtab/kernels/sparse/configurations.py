"""Every GPU kernel as the launchers start it: with which types, constants and tile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from itertools import product
from typing import Any

from trimtab.kernels.sparse import launch_tables
from trimtab.kernels.sparse.gpu_tiles import (
    IN_TORCH_TOO,
    Need,
    Tile,
    fit_block,
    has_tile,
    merge_tile,
    padded,
    power_of_two,
    slots_at_once,
    tile,
)

HEAD_SIZES = ((64, 64), (128, 128), (192, 128), (256, 256))
"""Dimensions of keys and values."""

ITEM_BYTES: Mapping[str, int] = {"bf16": 2, "fp32": 4}
"""By type; in registers and instructions float16 is as bfloat16."""

BLOCKS = (64, 128)
"""Tokens of a block, as in NSA and FSA; a query has 1024 of them."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """Where a kernel stands, whose tile it has, and what differs from `_TYPES`."""

    module: str
    function: str
    tile: str | None
    differs: Mapping[str, str]
    blocks: str | None = None
    """Whose tile says how large blocks can be, if it knows blocks."""
    square: bool = False
    """Whether its keys and values must be equally large."""


KERNELS: Mapping[str, Kernel] = {
    "forward": Kernel("triton_selected", "forward", "forward", {}, blocks="forward"),
    "near_and_join": Kernel("triton_near", "near_and_join", "near", {}, blocks="forward"),
    "far": Kernel("triton_near", "far", "far", {"out": "*i32"}),
    "by_query": Kernel("triton_selected", "by_query", "by_query", {}, blocks="by_query"),
    "backward": Kernel(
        "triton_selected", "backward", "backward", {"dk": "wide", "dv": "wide"}, blocks="backward"
    ),
    "add_chunks": Kernel(
        "triton_selected", "add_chunks", "backward", {"dk": "wide", "dv": "wide"}, blocks="backward"
    ),
    "sum_parts": Kernel("triton_selected", "sum_parts", None, {"part": "wide"}),
    "entry_logarithms": Kernel("triton_select", "entry_logarithms", "select", {}),
    "best_blocks": Kernel("triton_select", "best_blocks", "select", {"out": "*i32"}),
    "span": Kernel("triton_spans", "forward", "span", {}),
    "span_dq": Kernel("triton_spans", "backward_queries", "span_backward", {}),
    "span_dkv": Kernel("triton_spans", "backward_keys", "span_backward", {}),
    "prefill": Kernel("triton_prefill", "attend", "prefill", {"bits": "*i64"}, square=True),
    "prefill_by_query": Kernel(
        "triton_prefill", "attend", "prefill_by_query", {"bits": "*i64"}, square=True
    ),
    "prefill_estimate": Kernel(
        "triton_prefill", "block_logarithms", "prefill_estimate", {"out": "wide"}, square=True
    ),
    "published_maxima": Kernel(
        "triton_selected", "forward", "published", {"part": "wide"}, blocks="published"
    ),
    "published_forward": Kernel(
        "triton_selected", "forward", "published", {"part": "wide"}, blocks="published"
    ),
    "published_merge": Kernel("triton_selected", "merge", None, {"part": "wide"}),
}
"""All that the launchers start."""

_PASSES: Mapping[str, int] = {"forward": 0, "published_maxima": 1, "published_forward": 2}
"""``WHOLE``, ``MAXIMA`` and ``SHIFTED`` of `triton_selected`."""

_NARROW = ("q", "k", "v", "entries", "gradient", "out", "part", "dq", "dk", "dv")
_WIDE = ("part_max", "part_sum", "lse", "delta", "dq_part", "further_k", "further_v")
_LONG = ("rows", "block_first", "block_length", "last", "low", "high", "first_query", "end_query")
_LONG_TOO = ("further", "tile_first", "tile_length", "tile_sequence", "sequence", "before", "own")
_INT = ("ids", "query", "item_row", "item_chunk", "place", "pages", "lists", "counts", "odd")
_NUMBERS = ("blocks", "queries", "tokens", "tiles", "samples", "position", "lines")
_NUMBERS_TOO = ("keys", "begin", "count", "heads", "tiles_before", "until")
_STRIDES = ("page_stride", "head_stride", "slot_stride")
_TYPES: Mapping[str, str] = {
    **dict.fromkeys(_NARROW, "narrow"),
    **dict.fromkeys(_WIDE, "wide"),
    **dict.fromkeys((*_LONG, *_LONG_TOO), "*i64"),
    **dict.fromkeys(_INT, "*i32"),
    **dict.fromkeys((*_NUMBERS, *_NUMBERS_TOO, *_STRIDES), "i32"),
    "scale": "fp32",
}


@dataclass(frozen=True)
class Configuration:
    """A kernel with its types, constants and launch."""

    kernel: str
    backend: str
    head_size: tuple[int, int]
    dtype: str
    block: int
    group: int
    tile: Tile
    again: bool = False
    """Whether it is the launch for what odd values came out of."""

    @cached_property
    def function(self) -> Any:
        """The kernel itself."""
        where = KERNELS[self.kernel]
        module = import_module(f"trimtab.kernels.sparse.{where.module}")
        return getattr(module, where.function)

    @property
    def name(self) -> str:
        """What tells it from all others of its kernel and backend."""
        d, d_v = self.head_size
        name = f"{self.kernel}/{self.dtype}/d-{d}-{d_v}/block-{self.block}/group-{self.group}"
        return f"{name}/again" if self.again else name

    @property
    def launches(self) -> Iterator[Configuration]:
        """Itself, and the launch for what is odd, where there is one."""
        yield self
        if "AGAIN" in self.constants:
            yield replace(self, again=True, tile=self.tile.again())

    @property
    def constants(self) -> dict[str, Any]:
        """By the names of the kernel's arguments, as the launchers compute them."""
        d, d_v = self.head_size
        known = {
            "HEADS": 32,
            "GROUP": self.group,
            "GROUP_PAD": max(16 if self.kernel == "by_query" else 1, power_of_two(self.group)),
            "D": d,
            "PAD": padded(d),
            "D_V": d_v,
            "PAD_V": padded(d_v),
            "WIDEN": False,
            "BY_QUERY": self.kernel == "prefill_by_query",
            "BLOCK": self.block,
            "TOP": 1024 // self.block,
            "KEPT": max(16, 1024 // self.block),
            "AT_ONCE": slots_at_once(1024 // self.block),
            "ROWS": self.tile.rows,
            "QUERIES": self.tile.rows,
            "KEYS": self._keys,
            "ENTRIES": self.tile.columns,
            "PER_BLOCK": self.block // 16,
            "REACH": 1,
            "OUTER": 2,
            "FIRST": 1,
            "RECENT": 2,
            "PASS": _PASSES.get(self.kernel),
            "AGAIN": self.again,
            "CHUNK": self.tile.chunk,
            "STEP": 8,
            "PAGE": 16,
            "PER_PROGRAM": self.tile.columns,
        }
        return {name: known[name] for name in self.function.arg_names if name in known}

    @property
    def _keys(self) -> int:
        columns = self.tile.columns
        return min(columns, self.block) if KERNELS[self.kernel].blocks else columns

    @property
    def types(self) -> dict[str, str]:
        """Of all other arguments."""
        stands = {"narrow": f"*{self.dtype}", "wide": "*fp32"}
        types = {**_TYPES, **KERNELS[self.kernel].differs}
        others = (n for n in self.function.arg_names if n not in self.constants)
        return {name: stands.get(types[name], types[name]) for name in others}


def configuration(
    kernel: str,
    backend: str,
    head_size: tuple[int, int],
    dtype: str = "bf16",
    block: int = 64,
    group: int = 4,
) -> Configuration:
    """A kernel as the launchers start it for these sizes, maybe in smaller blocks."""
    of = KERNELS[kernel]
    if of.tile is None:
        how = merge_tile(group, max(head_size))
        return Configuration(kernel, backend, head_size, dtype, block, group, how)
    need = _need(of.tile, backend, head_size, dtype)
    fitting = fit_block(of.blocks, need, block) if of.blocks else block
    how = tile(of.tile, need, fitting if of.tile in (of.blocks, "select") else 0)
    return Configuration(kernel, backend, head_size, dtype, fitting, group, how)


TABLES = ("place", "spans", "cut", "number", "count", "begin", "scatter", "items")
"""The kernels of `triton_tables`; they know nothing of heads."""

_OF_TABLES = ("totals", "lengths", "first", "length")
_SIZES_OF_TABLES = ("known", "pieces", "lines", "row_count", "most", "group", "sequences")
_MORE_SIZES = ("block", "window", "stride")
_ENDS = ("cu_queries", "cu_keys", "cu_entries", "cumulative")


@dataclass(frozen=True)
class TableConfiguration(Configuration):
    """A kernel that makes index tables, for 64K tokens of one sequence in blocks."""

    @cached_property
    def function(self) -> Any:
        """The kernel itself."""
        return getattr(import_module("trimtab.kernels.sparse.triton_tables"), self.kernel)

    @property
    def name(self) -> str:
        """What tells it from all others."""
        return f"{self.kernel}/block-{self.block}"

    @property
    def constants(self) -> dict[str, Any]:
        """By the names of the kernel's arguments."""
        top = 1024 // self.block
        tile = launch_tables.tile_of(top, 65536 // self.block)
        how = launch_tables.constants(self.kernel, top, tile, chunk=512)
        return {name: value for name, value in how.items() if name != "num_warps"}

    @property
    def types(self) -> dict[str, str]:
        """Of all other arguments."""
        own = {
            **dict.fromkeys(_OF_TABLES, "*i64"),
            **dict.fromkeys((*_SIZES_OF_TABLES, *_MORE_SIZES), "i32"),
            **dict.fromkeys(("indices", "out", *_ENDS), "*i32"),
        }
        types = {**_TYPES, **own}
        return {n: types[n] for n in self.function.arg_names if n not in self.constants}


def table_configuration(kernel: str, backend: str, block: int = 64) -> TableConfiguration:
    """One of `TABLES` as it is launched, for lists of 1024 tokens."""
    how = Tile(rows=1, warps=launch_tables.constants(kernel)["num_warps"], stages=3)
    return TableConfiguration(kernel, backend, (0, 0), "bf16", block, 1, how)


def _need(kernel: str, backend: str, head_size: tuple[int, int], dtype: str) -> Need:
    d, d_v = head_size
    width = padded(d) + padded(d if kernel == "select" else d_v)
    return Need(backend, width, ITEM_BYTES[dtype])


def falls_back(kernel: str, backend: str, head_size: tuple[int, int], dtype: str) -> bool:
    """Whether the launchers do this in torch, for want of a tile."""
    of = KERNELS[kernel].tile
    return of in IN_TORCH_TOO and not has_tile(of, _need(of, backend, head_size, dtype))


def shipped(backend: str) -> Iterator[Configuration]:
    """Every configuration that differs from all others, for a backend."""
    found = {}
    for kernel, of in KERNELS.items():
        blocks = BLOCKS if of.blocks or kernel == "best_blocks" else (64,)
        sizes = [(d, d_v) for d, d_v in HEAD_SIZES if d == d_v or not of.square]
        for head_size, dtype, block in product(sizes, ITEM_BYTES, blocks):
            if not falls_back(kernel, backend, head_size, dtype):
                one = configuration(kernel, backend, head_size, dtype, block)
                found.update({each.name: each for each in one.launches})
        for group in (1, 16) if of.tile is None else (32,) if kernel == "by_query" else ():
            one = configuration(kernel, backend, HEAD_SIZES[-1], group=group)
            found[one.name] = one
    yield from found.values()
    for kernel in TABLES:
        for block in BLOCKS if kernel in ("number", "count", "scatter") else (64,):
            yield table_configuration(kernel, backend, block)
