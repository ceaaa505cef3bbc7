"""The Triton kernels that make index tables, launched.

All functions return None where a tensor is not on a GPU, nor Triton interpreted, or lists are
longer than a program can hold; callers then do the same in torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.kernels.sparse.gpu_tiles import power_of_two

_LONGEST_NUMBERED, LONGEST_INVERTED = 64, 1024
"""Slots of a query at most. To number them, all are compared with all."""
_MOST_ROWS = 1 << 15
"""Of a segment; each is compared with all."""
_ROWS, _COLUMNS = 32, 64


def _on_triton(x: Tensor) -> bool:
    """Not while torch traces, which sees the torch way through and would stumble over a launch."""
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return False
    from trimtab.kernels.sparse.launch import interpreted

    return x.is_cuda or (x.device.type == "cpu" and interpreted())


def constants(kernel: str, top: int = 1, tile: int = 1, chunk: int = 1) -> dict[str, int]:
    """The constants of a kernel, and its warps as ``num_warps``.

    Args:
        kernel: its name in `triton_tables`.
        top: slots of a query.
        tile: queries of a tile, of which choices are counted.
        chunk: rows of a work item.
    """
    slots = power_of_two(top)
    of_lists = {"TOP": top, "SLOTS": slots}
    own = {
        "place": {"ROWS": 256, "ENDS": 32},
        "spans": {"ROWS": 256, "ENDS": 32, "COMPRESSED": True},
        "cut": {"ROWS": 128, "ENDS": 16},
        "number": {**of_lists, "QUERIES": max(1, 4096 // slots**2)},
        "count": {**of_lists, "TILE": tile, "STEP": max(1, 256 // slots), "COLUMNS": 128},
        "begin": {"TILES": 32, "COLUMNS": _COLUMNS},
        "scatter": {**of_lists, "TILE": tile, "QUERIES": max(1, 1024 // slots)},
        "items": {"CHUNK": chunk, "ROWS": _ROWS, "WIDE": 32},
    }
    return {**own[kernel], "num_warps": 1 if kernel == "count" else 4}


def tile_of(top: int, blocks: int) -> int:
    """Queries of a tile: so many that its counts take a byte a choice or less."""
    return max(32, power_of_two(-(-4 * blocks // top)))


def number_through(ids: Tensor, own: Tensor, sequence: Tensor, before: Tensor) -> Tensor | None:
    """What `tables.number_through` returns.

    Args:
        ids: ``[kv_heads, queries, top]`` int32 or int64, any order.
        own: the last id of each query that counts, ``[queries]`` int64, below 2 ** 31.
        sequence: of each query, ``[queries]`` int64.
        before: what is added to the ids of each sequence, ``[sequences + 1]`` int64.
    """
    kv_heads, queries, top = ids.shape
    if not (_on_triton(ids) and ids.numel() and top <= _LONGEST_NUMBERED):
        return None
    from trimtab.kernels.sparse import triton_tables as kernels

    out = torch.empty(ids.shape, dtype=torch.int32, device=ids.device)
    how = constants("number", top)
    kernels.number[(-(-queries // how["QUERIES"]), kv_heads)](
        *(ids.contiguous(), own, sequence, before, out, queries), **how
    )
    return out


def place_queries(
    cu_queries: Tensor, cu_keys: Tensor, queries: int, block: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The last key, own block and sequence of `tables.Queries`.

    Args:
        cu_queries: ends of the packed sequences, ``[sequences + 1]``.
        cu_keys: the same of the keys.
        queries: how many there are.
        block: tokens of a block.
    """
    if not (_on_triton(cu_queries) and queries and cu_queries.numel() > 1):
        return None
    from trimtab.kernels.sparse import triton_tables as kernels

    last, own, sequence = torch.empty(3, queries, dtype=torch.int64, device=cu_queries.device)
    how = constants("place")
    kernels.place[(-(-queries // how["ROWS"]),)](
        *(cu_queries.contiguous(), cu_keys.contiguous(), last, own, sequence),
        *(queries, cu_queries.numel() - 1, block),
        **how,
    )
    return last, own, sequence


def spans(
    cu_queries: Tensor,
    cu_keys: Tensor,
    cu_entries: Tensor | None,
    queries: int,
    window: int,
    stride: int = 1,
) -> tuple[Tensor, Tensor] | None:
    """What `tables.sees_entries` returns, or without ``cu_entries`` `tables.sees_window`."""
    if not (_on_triton(cu_queries) and queries and cu_queries.numel() > 1):
        return None
    from trimtab.kernels.sparse import triton_tables as kernels

    low, high = torch.empty(2, queries, dtype=torch.int64, device=cu_queries.device)
    how = {**constants("spans"), "COMPRESSED": cu_entries is not None}
    entries = cu_keys if cu_entries is None else cu_entries
    kernels.spans[(-(-queries // how["ROWS"]),)](
        *(cu_queries.contiguous(), cu_keys.contiguous(), entries.contiguous(), low, high),
        *(queries, cu_queries.numel() - 1, window, stride),
        **how,
    )
    return low, high


def cut(
    cumulative: Tensor, tokens: int, block: int
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """The beginnings, lengths and sequences of `tables.Blocks`, and those before each sequence.

    Args:
        cumulative: ends of the packed sequences, ``[sequences + 1]``.
        tokens: the last of them.
        block: tokens of a block.
    """
    sequences = cumulative.numel() - 1
    most = tokens // block + sequences
    if not (_on_triton(cumulative) and sequences > 0):
        return None
    from trimtab.kernels.sparse import triton_tables as kernels

    first, length, sequence = torch.empty(3, most, dtype=torch.int64, device=cumulative.device)
    before = torch.empty(sequences + 1, dtype=torch.int64, device=cumulative.device)
    how = constants("cut")
    kernels.cut[(-(-most // how["ROWS"]),)](
        *(cumulative.contiguous(), first, length, sequence, before, most, sequences, block), **how
    )
    return first, length, sequence, before


def invert(ids: Tensor, blocks: int, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """The rows, their lengths, queries and places of `tables.BlockMajor`.

    Args:
        ids: ``[kv_heads, queries, top]`` int32; what is below 0 is none, and no query names a block
            twice.
        blocks: how many there are.
        step: queries of a line.
    """
    kv_heads, known, top = ids.shape
    if not (_on_triton(ids) and ids.numel() and top <= LONGEST_INVERTED):
        return None
    from trimtab.kernels.sparse import triton_tables as kernels

    if ids.stride()[1:] != (top, 1):
        ids = ids.contiguous()
    pieces = -(-known // step)
    lines, tile = kv_heads * pieces, tile_of(top, blocks)
    tiles = -(-step // tile)
    entries = lines * step * top
    counted = torch.int32 if entries < 2**31 else torch.int64
    place = torch.empty(lines, step, top, dtype=counted, device=ids.device)
    query = torch.empty(entries, dtype=torch.int32, device=ids.device)
    counts = torch.empty(lines, tiles, blocks + 1, dtype=counted, device=ids.device)
    totals = torch.empty(lines * blocks, dtype=torch.int64, device=ids.device)
    rows = torch.empty(lines * blocks + 1, dtype=torch.int64, device=ids.device)
    kernels.count[(lines * tiles,)](
        *(ids, place, counts, ids.stride(0), known, step, pieces, tiles, blocks),
        **constants("count", top, tile),
    )
    kernels.begin[(lines * -(-(blocks + 1) // _COLUMNS),)](
        *(counts, totals, rows, tiles, blocks), **constants("begin")
    )
    torch.cumsum(totals, 0, out=rows[1:])
    how = constants("scatter", top, tile)
    kernels.scatter[(lines * -(-step // how["QUERIES"]),)](
        *(ids, place, counts, rows, query, ids.stride(0), known, step, pieces),
        *(lines, tiles, blocks),
        **how,
    )
    return rows, totals, query, place


def work(lengths: Tensor, group: int, most: int, size: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The rows, chunks and further chunks of `tables.Work`.

    Args:
        lengths: queries of each row, ``[segments, rows]`` int64.
        group: heads of a query.
        most: what the queries of a segment and their heads can add up to at most.
        size: of an item.
    """
    segments, rows = lengths.shape
    if not (_on_triton(lengths) and lengths.numel() and rows <= _MOST_ROWS):
        return None
    from trimtab.kernels.sparse import triton_tables as kernels

    count = most // size + rows
    items = torch.empty(2, segments, count, dtype=torch.int32, device=lengths.device)
    further = torch.empty(segments, rows + 1, dtype=torch.int64, device=lengths.device)
    kernels.items[(segments * -(-rows // _ROWS),)](
        *(lengths.contiguous(), items[0], items[1], further, rows, count, group),
        **constants("items", chunk=size),
    )
    return items[0], items[1], further
