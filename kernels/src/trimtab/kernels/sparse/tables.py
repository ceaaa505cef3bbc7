"""Index tables: packed sequences cut into blocks, and lists of blocks turned into lists of queries.

Nothing here depends on the values of its input in shape, nor waits for a device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.kernels.sparse import block_lists, launch_tables


@dataclass(frozen=True, slots=True)
class Blocks:
    """Packed sequences cut into blocks, numbered through; padded to a length known beforehand."""

    first: Tensor
    """Where each block begins in the packed tokens, ``[blocks]`` int64."""
    length: Tensor
    """Its tokens, 0 where there is no block, ``[blocks]`` int64."""
    sequence: Tensor
    """Its sequence, ``[blocks]`` int64."""
    before: Tensor
    """Blocks of all earlier sequences, ``[sequences + 1]`` int64."""


def cut(cumulative: Tensor, tokens: int, block: int) -> Blocks:
    """Cuts packed sequences, whose ends are ``cumulative [sequences + 1]``, into blocks."""
    on_gpu = launch_tables.cut(cumulative, tokens, block)
    if on_gpu is not None:
        return Blocks(*on_gpu)
    ends = cumulative.long()
    counts = (ends.diff() + block - 1) // block
    before = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    most = tokens // block + counts.numel()
    ids = torch.arange(most, device=ends.device)
    sequence = torch.searchsorted(before[1:], ids, right=True).clamp(max=counts.numel() - 1)
    first = ends[sequence] + (ids - before[sequence]) * block
    length = (ends[sequence + 1] - first).clamp(0, block)
    return Blocks(first, length, sequence, before)


@dataclass(frozen=True, slots=True)
class Queries:
    """What each packed query sees."""

    last: Tensor
    """Its own key among the packed ones, ``[queries]`` int64."""
    own: Tensor
    """Its own block within its sequence, ``[queries]`` int64."""
    sequence: Tensor
    ends: Tensor
    """Of the packed sequences, ``[sequences + 1]``."""


def place_queries(cu_queries: Tensor, cu_keys: Tensor, queries: int, block: int) -> Queries:
    """Lays queries beside keys: the last query of a sequence belongs to its last key."""
    on_gpu = launch_tables.place_queries(cu_queries, cu_keys, queries, block)
    if on_gpu is not None:
        return Queries(*on_gpu, cu_queries)
    ends, key_ends = cu_queries.long(), cu_keys.long()
    at = torch.arange(queries, device=ends.device)
    sequence = torch.searchsorted(ends[1:], at, right=True).clamp(max=ends.numel() - 2)
    last = key_ends[sequence + 1] - (ends[sequence + 1] - at)
    own = (last - key_ends[sequence]).clamp(min=0) // block
    return Queries(last, own, sequence, cu_queries)


def sees_window(
    cu_queries: Tensor, cu_keys: Tensor, queries: int, window: int
) -> tuple[Tensor, Tensor]:
    """The first of the ``window`` latest keys of each packed query, and the end of its last one."""
    on_gpu = launch_tables.spans(cu_queries, cu_keys, None, queries, window)
    if on_gpu is not None:
        return on_gpu
    placed = place_queries(cu_queries, cu_keys, queries, 1)
    high = placed.last + 1
    return torch.maximum(cu_keys.long()[placed.sequence], high - window), high


def sees_entries(
    cu_queries: Tensor, cu_keys: Tensor, cu_entries: Tensor, queries: int, window: int, stride: int
) -> tuple[Tensor, Tensor]:
    """The first packed entry of each query's sequence, and the end of those that lie behind it."""
    on_gpu = launch_tables.spans(cu_queries, cu_keys, cu_entries, queries, window, stride)
    if on_gpu is not None:
        return on_gpu
    placed = place_queries(cu_queries, cu_keys, queries, 1)
    position = placed.last - cu_keys.long()[placed.sequence]
    low = cu_entries.long()[placed.sequence]
    return low, low + ((position + 1 - window) // stride + 1).clamp(min=0)


def number_through(indices: Tensor, queries: Queries, blocks: Blocks) -> Tensor:
    """Turns ids within sequences into ids of `Blocks`, ascending; -1 for what is none.

    Negative, future and repeated ids are dropped.

    Args:
        indices: ``[kv_heads, queries, top]``, any order.
        queries: where the queries lie.
        blocks: where the blocks lie.

    Returns:
        ``[kv_heads, queries, top]`` int32, the absent ones last.
    """
    own, sequence = queries.own, queries.sequence
    numbered = launch_tables.number_through(indices, own, sequence, blocks.before)
    if numbered is not None:
        return numbered
    before = blocks.before[sequence]
    numbered = block_lists.number_through(indices, own, before)
    if numbered is not None:
        return numbered
    none = blocks.first.numel()
    ids = indices.long()
    wrong = (ids < 0) | (ids > own[:, None])
    known = (ids + before[:, None]).masked_fill(wrong, none).sort(-1).values
    repeated = torch.zeros_like(known, dtype=torch.bool)
    repeated[..., 1:] = known[..., 1:] == known[..., :-1]
    known = known.masked_fill(repeated, none).sort(-1).values
    return known.masked_fill(known == none, -1).int()


@dataclass(frozen=True, slots=True)
class BlockMajor:
    """The queries of each block in compressed rows, a row for each KV head and block.

    Two integers for each query and slot, where dense tables have four for each query and block.
    """

    rows: Tensor
    """Where each row begins, ``[kv_heads * blocks + 1]`` int64."""
    lengths: Tensor
    """Its queries, ``[kv_heads * blocks]`` int64."""
    query: Tensor
    """The queries, ascending in each row, ``[kv_heads * queries * top]`` int32."""
    place: Tensor
    """Where each slot of each query went, -1 if it is empty; ``[kv_heads, queries, top]``, int32
    unless there are too many."""


def block_major(ids: Tensor, blocks: int, step: int | None = None) -> BlockMajor:
    """Inverts lists of blocks; a stable sort.

    On a GPU Triton kernels, on a CPU compiled code counts instead.

    Args:
        ids: ``[kv_heads, queries, top]`` int32, -1 is none; no query names a block twice.
        blocks: how many there are.
        step: queries of a line. A KV head's are then cut into lines, whose last one is filled up
            with queries that have no blocks, and each line is taken for a KV head. By default a
            line has all queries.
    """
    step = ids.shape[1] if step is None else step
    on_gpu = launch_tables.invert(ids, blocks, step)
    if on_gpu is not None:
        return BlockMajor(*on_gpu)
    ids = _lines(ids, step)
    counted_out = block_lists.invert(ids, blocks)
    if counted_out is not None:
        rows, query, place = counted_out
        return BlockMajor(rows, rows.diff(), query, place)
    kv_heads, queries, top = ids.shape
    keys = torch.int32 if kv_heads * blocks < 2**31 - 1 else torch.int64
    counted = torch.int32 if ids.numel() < 2**31 else torch.int64
    head = torch.arange(kv_heads, dtype=keys, device=ids.device)[:, None, None] * blocks
    row = (ids.to(keys) + head).masked_fill(ids < 0, kv_heads * blocks).flatten()
    ordered = row.sort(stable=True)
    starts = torch.arange(kv_heads * blocks + 1, dtype=keys, device=ids.device)
    rows = torch.searchsorted(ordered.values, starts)
    place = torch.empty_like(row, dtype=counted)
    place[ordered.indices] = torch.arange(row.numel(), dtype=counted, device=ids.device)
    place = place.masked_fill(row == kv_heads * blocks, -1).view(ids.shape)
    query = ((ordered.indices // top) % max(queries, 1)).int()
    return BlockMajor(rows, rows.diff(), query, place)


def _lines(ids: Tensor, step: int) -> Tensor:
    """Pieces of so many queries, in which -1 stands behind the last."""
    _, queries, top = ids.shape
    if queries == step:
        return ids
    pieces = -(-queries // step)
    padding = (0, 0, 0, pieces * step - queries)
    return torch.nn.functional.pad(ids, padding, value=-1).reshape(-1, step, top)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Work items of equal size: the row of each, -1 beyond the last, and its chunk of the row."""

    row: Tensor
    chunk: Tensor


def schedule(table: BlockMajor, group: int, rows_per_item: int) -> Schedule:
    """Cuts rows of ``group`` heads a query into items; as many as can be needed at most."""
    counts = (table.rows.diff() * group + rows_per_item - 1) // rows_per_item
    ends = counts.cumsum(0)
    most = table.query.numel() * group // rows_per_item + counts.numel()
    items = torch.arange(most, device=ends.device)
    row = torch.searchsorted(ends, items, right=True)
    inside = row.clamp(max=counts.numel() - 1)
    chunk = items - (ends - counts)[inside]
    return Schedule(row.masked_fill(row == counts.numel(), -1).int(), chunk.int())


@dataclass(frozen=True, slots=True)
class Work:
    """The work items of several segments, the longest of each first, and chunks beyond the first.

    A row of a segment is a KV head and block. Its chunks add up to one result, so that those
    beyond its first need places of their own.
    """

    row: Tensor
    """``[segments, items]`` int32, -1 behind the last."""
    chunk: Tensor
    further: Tensor
    """Where the further chunks of each row begin, ``[segments, rows + 1]`` int64."""


def work(lengths: Tensor, group: int, most: int, rows_per_item: int) -> Work:
    """Cuts rows into items, as `schedule` does, for several segments at once.

    Args:
        lengths: queries of each row, ``[segments, rows]``.
        group: heads of a query.
        most: what the queries of a segment and their heads can add up to at most.
        rows_per_item: of a chunk.
    """
    on_gpu = launch_tables.work(lengths, group, most, rows_per_item)
    if on_gpu is not None:
        return Work(*on_gpu)
    lengths = lengths * group
    counts = (lengths + rows_per_item - 1) // rows_per_item
    ends = counts.cumsum(1)
    segments, rows = lengths.shape
    items = torch.arange(most // rows_per_item + rows, device=ends.device).repeat(segments, 1)
    row = torch.searchsorted(ends, items, right=True)
    inside = row.clamp(max=rows - 1)
    chunk = items - (ends - counts).gather(1, inside)
    left = (lengths.gather(1, inside) - chunk * rows_per_item).clamp(max=rows_per_item)
    absent = row == rows
    order = left.masked_fill(absent, 0).sort(dim=1, descending=True, stable=True).indices
    further = torch.nn.functional.pad((counts - 1).clamp(min=0).cumsum(1), (1, 0))
    known = row.masked_fill(absent, -1)
    return Work(known.gather(1, order).int(), chunk.gather(1, order).int(), further)
