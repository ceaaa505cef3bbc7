"""Lists of blocks on a CPU: chosen in one stream over compressed keys, checked, and inverted.

The compiled code of ``block_lists.cpp``. All functions return None where it was not built, or does
not know the type; callers then do the same in torch.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.kernels.sparse.compiled import DTYPES, integers, library, pointers, pointing
from trimtab.kernels.sparse.shape import SparseShape

_TILE, _PANEL = 16, 64
_LONGEST_LIST = 128


class _Selection(ctypes.Structure):
    """``Selection`` of ``block_lists.cpp``, field for field."""

    _fields_ = (
        *pointers("q", "entries", "out", "panels", "panel_first", "panel_length"),
        *pointers("tile_query", "tile_panel", "tile_queries", "tile_position", "tile_entries"),
        *pointers("weights"),
        *integers("q_token", "q_head", "entry_token", "entry_head"),
        *integers("tiles", "panel_count", "longest", "queries", "heads", "kv_heads", "d"),
        *integers("window", "stride", "per_block", "reach", "taps"),
        *integers("block", "top", "first", "recent"),
        ("scale", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


class _Numbering(ctypes.Structure):
    """``Numbering`` of ``block_lists.cpp``, field for field."""

    _fields_ = (
        *pointers("ids", "out", "own", "before"),
        *integers("ids_head", "ids_query", "kv_heads", "queries", "top"),
        ("long_ids", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


class _Inversion(ctypes.Structure):
    """``Inversion`` of ``block_lists.cpp``, field for field."""

    _fields_ = (
        *pointers("ids", "rows", "query", "place", "counts"),
        *integers("ids_head", "ids_query", "kv_heads", "queries", "top", "blocks", "chunks"),
        ("long_place", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


def code() -> ctypes.CDLL | None:
    """The compiled code, or None; the reason is told in the log once."""
    sizes = (
        ("trimtab_selection_bytes", ctypes.sizeof(_Selection)),
        ("trimtab_numbering_bytes", ctypes.sizeof(_Numbering)),
        ("trimtab_inversion_bytes", ctypes.sizeof(_Inversion)),
    )
    return library("block_lists", sizes, "blocks are chosen on a CPU")


def select(
    q: Tensor,
    entries: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    cu_entries: Tensor,
    shape: SparseShape,
    scale: float,
) -> Tensor | None:
    """The blocks that packed queries choose, as `operators.select_blocks` says.

    Scores are made for 16 queries at a time, and are gone with them: besides the result a thread
    needs eight bytes for each of these and of the longest sequence's entries.
    """
    built = code()
    if built is None or q.dtype not in DTYPES or q.device.type != "cpu":
        return None
    count, heads, d = q.shape
    kv_heads = entries.shape[1]
    out = torch.full((kv_heads, count, shape.top), -1, dtype=torch.int32)
    if count == 0:
        return out
    q, entries = _dense(q), _dense(entries.to(q.dtype))
    ends = cu_entries.long()
    tile, panel = _cut(cu_queries, _TILE), _cut(ends, _PANEL)
    last_key = cu_keys.long()[1:] - cu_queries.long()[1:]
    position = tile.first + last_key[tile.sequence] - cu_keys.long()[tile.sequence]
    lengths = ends.diff()
    kept = {
        "q": q,
        "entries": entries,
        "out": out,
        "panels": torch.empty(kv_heads * panel.first.numel() * d * _PANEL),
        "panel_first": panel.first,
        "panel_length": panel.length,
        "tile_query": tile.first,
        "tile_panel": panel.before[tile.sequence],
        "tile_queries": tile.length,
        "tile_position": position,
        "tile_entries": lengths[tile.sequence],
        "weights": torch.tensor(shape.weights, dtype=torch.float32),
    }
    problem = _Selection(
        q_token=q.stride(0),
        q_head=q.stride(1),
        entry_token=entries.stride(0),
        entry_head=entries.stride(1),
        tiles=tile.first.numel(),
        panel_count=panel.first.numel(),
        longest=-(-int(lengths.max()) // _PANEL) * _PANEL,
        queries=count,
        heads=heads,
        kv_heads=kv_heads,
        d=d,
        window=shape.window,
        stride=shape.stride,
        per_block=shape.entries_per_block,
        reach=shape.reach,
        taps=len(shape.weights),
        block=shape.block,
        top=shape.top,
        first=shape.first,
        recent=shape.recent,
        scale=scale,
        dtype=DTYPES[q.dtype],
        threads=torch.get_num_threads(),
    )
    pointing(problem, kept)
    built.trimtab_select_blocks(ctypes.byref(problem))
    return out


def _dense(x: Tensor) -> Tensor:
    """With the last dimension's numbers side by side, as the compiled code reads them."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _Parts(NamedTuple):
    """Packed sequences cut into parts that are there."""

    first: Tensor
    length: Tensor
    sequence: Tensor
    before: Tensor
    """Parts of all earlier sequences, ``[sequences + 1]``."""


def _cut(cumulative: Tensor, size: int) -> _Parts:
    ends = cumulative.long()
    counts = (ends.diff() + size - 1) // size
    before = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    sequence = torch.arange(counts.numel()).repeat_interleave(counts)
    first = ends[sequence] + (torch.arange(sequence.numel()) - before[sequence]) * size
    return _Parts(first, (ends[sequence + 1] - first).clamp(max=size), sequence, before)


def number_through(ids: Tensor, own: Tensor, before: Tensor) -> Tensor | None:
    """What `tables.number_through` returns; None also where lists are long, which sorting suits.

    Args:
        ids: ``[kv_heads, queries, top]`` int32 or int64, any order.
        own: the last id of each query that counts, ``[queries]`` int64.
        before: what is added to its ids, ``[queries]`` int64.
    """
    built = code()
    known = ids.dtype in (torch.int32, torch.int64) and ids.device.type == "cpu"
    if built is None or not known or ids.shape[2] > _LONGEST_LIST:
        return None
    kept = {"ids": _dense(ids), "own": own.contiguous(), "before": before.contiguous()}
    kept["out"] = torch.empty(ids.shape, dtype=torch.int32)
    problem = _Numbering(
        ids_head=kept["ids"].stride(0),
        ids_query=kept["ids"].stride(1),
        kv_heads=ids.shape[0],
        queries=ids.shape[1],
        top=ids.shape[2],
        long_ids=ids.dtype == torch.int64,
        threads=torch.get_num_threads(),
    )
    pointing(problem, kept)
    built.trimtab_number_through(ctypes.byref(problem))
    return kept["out"]


def invert(ids: Tensor, blocks: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The rows, queries and places of `tables.BlockMajor`; a counting sort.

    Args:
        ids: ``[kv_heads, queries, top]`` int32; what is below 0 is none.
        blocks: how many there are.
    """
    built = code()
    if built is None or ids.dtype != torch.int32 or ids.device.type != "cpu":
        return None
    ids = _dense(ids)
    kv_heads, queries, top = ids.shape
    threads = torch.get_num_threads()
    chunks = max(1, -(-threads // max(1, kv_heads)))
    is_long = ids.numel() >= 2**31
    rows = torch.empty(kv_heads * blocks + 1, dtype=torch.int64)
    # Entries behind the last row's are read by nobody, but must name a query.
    query = torch.empty(ids.numel(), dtype=torch.int32)
    place = torch.empty(ids.shape, dtype=torch.int64 if is_long else torch.int32)
    counts = torch.zeros(kv_heads * chunks * blocks, dtype=torch.int64)
    problem = _Inversion(
        ids_head=ids.stride(0),
        ids_query=ids.stride(1),
        kv_heads=kv_heads,
        queries=queries,
        top=top,
        blocks=blocks,
        chunks=chunks,
        long_place=is_long,
        threads=threads,
    )
    kept = {"ids": ids, "rows": rows, "query": query, "place": place, "counts": counts}
    pointing(problem, kept)
    built.trimtab_invert_lists(ctypes.byref(problem))
    query[int(rows[-1]) :] = 0
    return rows, query, place
