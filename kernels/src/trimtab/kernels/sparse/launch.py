"""The Triton kernels called in order, in segments that fit a workspace."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from trimtab.kernels.sparse import blockwise, tables
from trimtab.kernels.sparse.chosen import Chosen
from trimtab.kernels.sparse.gpu_tiles import (
    Need,
    Tile,
    choice_tile,
    fit_block,
    has_tile,
    merge_tile,
    padded,
    power_of_two,
    slots_at_once,
    tile,
)
from trimtab.kernels.sparse.selected_plan import SelectedPlan, plan_selected
from trimtab.kernels.sparse.shape import SparseShape
from trimtab.kernels.sparse.tables import BlockMajor, Blocks, Queries

logger = logging.getLogger(__name__)


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, as it must on a machine without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def launched(how: Tile) -> dict[str, int]:
    """What Triton itself is told."""
    return {"num_warps": how.warps, "num_stages": how.stages}


@cache
def in_torch(kernel: str, need: Need) -> bool:
    """Whether no tile of a kernel holds heads so wide, which is said once."""
    if has_tile(kernel, need):
        return False
    logger.warning(
        "gradients of attention are computed in torch, not in Triton: no tile of %s holds heads"
        " %d wide, keys and values together, with %d bytes a number",
        *(kernel, need.width, need.item_bytes),
    )
    return True


def of_keys(q: Tensor, k: Tensor) -> dict[str, Any]:
    """The constants of kernels that read queries and keys."""
    return {
        "HEADS": q.shape[1],
        "GROUP": q.shape[1] // k.shape[1],
        "D": q.shape[2],
        "PAD": padded(q.shape[2]),
        "WIDEN": interpreted() and q.dtype == torch.bfloat16,
    }


def of_values(v: Tensor) -> dict[str, int]:
    """The constants of kernels that read or write values."""
    return {"D_V": v.shape[2], "PAD_V": padded(v.shape[2])}


def of_group(chosen: Chosen) -> dict[str, int]:
    """The constants of kernels that join the parts of one query's group."""
    group = chosen.group
    heads = {"HEADS": chosen.q.shape[1], "GROUP": group, "GROUP_PAD": power_of_two(group)}
    how = merge_tile(group, max(chosen.q.shape[-1], chosen.v.shape[-1]))
    return {"TOP": chosen.top, **heads, **launched(how)}


@dataclass(frozen=True, slots=True)
class Attempt:
    """A launch, or the one after it for what odd values came out of: infinite or none."""

    again: bool
    grid: tuple[int, ...]
    """Of the second, a program for all heads of a tile: most have nothing to do."""
    odd: Tensor
    """By program of the first, int32: 0 if there were none, or its tile's number from 1 on."""
    how: Tile

    @classmethod
    def both(cls, grid: tuple[int, ...], how: Tile, like: Tensor) -> Iterator[Attempt]:
        """In their order. Nothing waits for the GPU to say that the second has nothing to do.

        Args:
            grid: programs of the first; for tiles of queries, by tile and head.
            how: the first one's tile.
            like: a tensor on their GPU.
        """
        odd = like.new_empty(prod(grid), dtype=torch.int32)
        yield cls(False, grid, odd, how)
        yield cls(True, grid[:1], odd, how.again())


def fitted(kernel: str, chosen: Chosen) -> tuple[Chosen, Tile]:
    """In blocks as small as the kernel's tiles need, and its tile."""
    need = Need.of(chosen.q, chosen.v)
    while chosen.block > fit_block(kernel, need, chosen.block):
        chosen = chosen.halved()
    return chosen, tile(kernel, need, chosen.block)


@dataclass(frozen=True, slots=True)
class Place:
    """Neighbouring queries and KV heads of a call, and the heads of these."""

    part: slice
    kv: slice
    heads: slice


@dataclass(frozen=True, slots=True)
class Segment(Place):
    """Whose parts fit the workspace: what its queries chose, and the work items."""

    table: BlockMajor
    """Of these alone, but that its lists lie in those of other segments, whose length is fixed."""
    entries: int
    """Choices at most."""
    item_row: Tensor
    item_chunk: Tensor
    further: Tensor


def segments(
    chosen: Chosen, how: Tile, part_bytes: int, *, shared: bool = False, busy: int | None = None
) -> Iterator[Segment]:
    """The segments of `Chosen.lots`, with the work items of a tile."""
    group, blocks = chosen.group, chosen.blocks.first.numel()
    for lot in chosen.lots(part_bytes, shared=shared, busy=busy):
        pieces = -(-(lot.part.stop - lot.part.start) // lot.step)
        table = tables.block_major(chosen.ids[lot.kv, lot.part], blocks, lot.step)
        row_count, entries = lot.heads * blocks, lot.heads * lot.busy * chosen.top
        lengths = table.lengths.view(-1, row_count)
        work = tables.work(lengths, group, entries * group, how.chunk)
        for number in range(lengths.shape[0]):
            kv_head, piece = divmod(number * lot.heads, pieces)
            begin = lot.part.start + piece * lot.step
            kv = slice(lot.kv.start + kv_head, lot.kv.start + kv_head + lot.heads)
            place = table.place[number * lot.heads : (number + 1) * lot.heads]
            rows = table.rows[number * row_count : (number + 1) * row_count + 1]
            yield Segment(
                slice(begin, min(lot.part.stop, begin + lot.step)),
                kv,
                slice(kv.start * group, kv.stop * group),
                BlockMajor(rows, lengths[number], table.query, place),
                entries,
                *(work.row[number], work.chunk[number], work.further[number]),
            )
        del table, work, lengths


def pass_over_blocks(
    kind: Any, chosen: Chosen, how: Tile, of: Segment, written: tuple[Tensor, Tensor, Tensor]
) -> None:
    """One of the main kernel's passes over the blocks of a segment.

    Args:
        kind: ``WHOLE``, ``MAXIMA`` or ``SHIFTED`` of `triton_selected`.
        chosen: in blocks that fit the tile.
        how: the tile.
        of: the segment.
        written: partial outputs, maxima and sums, by entry and head of the group.
    """
    from trimtab.kernels.sparse import triton_selected as kernels

    blocks = chosen.blocks
    kernels.forward[(of.item_row.numel(),)](
        *(chosen.q[of.part, of.heads], chosen.k[:, of.kv], chosen.v[:, of.kv], *written),
        *(of.table.rows, of.table.query, of.item_row, of.item_chunk),
        *(blocks.first, blocks.length, chosen.queries.last[of.part]),
        *(chosen.scale, blocks.first.numel()),
        **of_keys(chosen.q, chosen.k),
        **of_values(chosen.v),
        **launched(how),
        BLOCK=chosen.block,
        ROWS=how.rows,
        CHUNK=how.chunk,
        PASS=kind.value,
    )


def _plan(chosen: Chosen) -> SelectedPlan:
    sizes = chosen.q.shape[-1], chosen.v.shape[-1], chosen.block, chosen.q.element_size()
    return plan_selected(chosen.group, *sizes)


def selected_forward(chosen: Chosen) -> tuple[Tensor, Tensor]:
    """Output and natural logarithm of selected attention, by queries or by blocks."""
    if _plan(chosen).path == "queries":
        return forward_by_queries(chosen)
    return forward_by_blocks(chosen)


def forward_by_queries(chosen: Chosen) -> tuple[Tensor, Tensor]:
    """`selected_forward` a query at a time."""
    from trimtab.kernels.sparse import triton_selected as kernels

    chosen, how = fitted("by_query", chosen)
    blocks, (queries, *_) = chosen.blocks, chosen.q.shape
    out, lse = chosen.unwritten()
    kernels.by_query[(queries, chosen.k.shape[1])](
        *(chosen.q, chosen.k, chosen.v, chosen.ids.contiguous(), out, lse),
        *(blocks.first, blocks.length, chosen.queries.last, chosen.scale, queries),
        **of_keys(chosen.q, chosen.k),
        **of_values(chosen.v),
        **launched(how),
        TOP=chosen.top,
        GROUP_PAD=padded(chosen.group),
        BLOCK=chosen.block,
    )
    return out, lse


def forward_by_blocks(chosen: Chosen) -> tuple[Tensor, Tensor]:
    """`selected_forward` a block at a time, but for what is near: see `triton_near`."""
    from trimtab.kernels.sparse.triton_selected import WHOLE

    chosen, how = fitted("forward", chosen)
    q, v = chosen.q, chosen.v
    out, lse = chosen.unwritten()
    part_bytes = v.shape[-1] * q.element_size() + 8
    near = Near.of(chosen)
    # One query a key at most, and none of a sequence's first keys, has far blocks.
    late = min(q.shape[0], chosen.k.shape[0] - near.until)
    if late <= 0:
        near.attend(out, lse)
        return out, lse
    distant = replace(chosen, ids=near.far_ids())
    for of in segments(distant, how, part_bytes, shared=True, busy=late):
        rows = of.entries * chosen.group
        parts = q.new_empty(rows, v.shape[-1]), lse.new_empty(rows), lse.new_empty(rows)
        pass_over_blocks(WHOLE, distant, how, of, parts)
        near.join(of, of.table.rows, of.table.place, parts, out, lse)
        del of, parts  # or the next ones would be made beside them
    return out, lse


@dataclass(frozen=True, slots=True)
class Near:
    """Blocks of which a tile's queries share the keys, and the tiles."""

    chosen: Chosen
    until: int
    """Queries before it call all blocks near, in tokens from the beginning of their sequence."""
    how: Tile
    tiles: Blocks

    @classmethod
    def of(cls, chosen: Chosen) -> Near:
        """For blocks that fit `forward`."""
        how = tile("near", Need.of(chosen.q, chosen.v))
        tiles = tables.cut(chosen.queries.ends, chosen.q.shape[0], how.rows)
        return cls(chosen, _plan(chosen).dense_until(chosen.top, chosen.block), how, tiles)

    def far_ids(self) -> Tensor:
        """The ids of blocks that are not near, -1 in place of others."""
        from trimtab.kernels.sparse import triton_near as kernels

        chosen = self.chosen
        kv_heads, queries, top = chosen.ids.shape
        ids = chosen.ids.contiguous()
        out = torch.empty_like(ids)
        how = tile("far", Need.of(chosen.q, chosen.v))
        kernels.far[(-(-queries // how.rows), kv_heads)](
            *(ids, out, chosen.queries.last, chosen.queries.sequence, chosen.blocks.before),
            *(chosen.blocks.first, queries, chosen.k.shape[0], self.until),
            **launched(how),
            TOP=top,
            KEPT=padded(top),
            BLOCK=chosen.block,
            ROWS=how.rows,
        )
        return out

    def attend(self, out: Tensor, lse: Tensor) -> None:
        """Where no query is late enough to have far blocks, whatever it has chosen."""
        queries, heads = self.chosen.q.shape[:2]
        every = Place(slice(0, queries), slice(0, self.chosen.k.shape[1]), slice(0, heads))
        unread = self.chosen.ids.new_empty(1, 1, 1, dtype=torch.int32)
        self.join(every, self.chosen.blocks.first, unread, (out, lse, lse), out, lse)

    def join(
        self,
        of: Place,
        rows: Tensor,
        place: Tensor,
        parts: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        lse: Tensor,
    ) -> None:
        """Attends to what is near, and joins the parts of a segment to it."""
        from trimtab.kernels.sparse import triton_near as kernels

        chosen, tile_rows = self.chosen, self.how.rows
        mine, heads = (of.part, of.heads), of.heads.stop - of.heads.start
        passed = of.part.start // tile_rows
        # A sequence has one tile at most that is not full.
        reached = (of.part.stop - 1) // tile_rows + chosen.queries.ends.numel() - 1
        count = min(reached, self.tiles.first.numel()) - passed
        ids = chosen.ids.contiguous()
        for attempt in Attempt.both((count, heads), self.how, chosen.q):
            kernels.near_and_join[attempt.grid](
                *(chosen.q[mine], chosen.k[:, of.kv], chosen.v[:, of.kv], ids[of.kv, of.part]),
                *(*parts, rows, place, out[mine], lse[mine]),
                *(self.tiles.first, self.tiles.length, self.tiles.sequence),
                *(chosen.blocks.before, chosen.blocks.first),
                *(chosen.queries.last[of.part], attempt.odd),
                *(chosen.scale, of.part.start, of.part.stop - of.part.start, heads),
                *(passed, self.until, chosen.q.shape[0], place.shape[1]),
                **of_keys(chosen.q, chosen.k),
                **of_values(chosen.v),
                **launched(attempt.how),
                TOP=chosen.top,
                AT_ONCE=slots_at_once(chosen.top),
                BLOCK=chosen.block,
                ROWS=tile_rows,
                KEYS=min(attempt.how.columns, chosen.block),
                AGAIN=attempt.again,
            )


def selected_backward(
    gradient: Tensor, out: Tensor, lse: Tensor, chosen: Chosen
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, the same bits at every run."""
    from trimtab.kernels.sparse import triton_selected as kernels

    if in_torch("backward", Need.of(chosen.q, chosen.v)):
        return blockwise.backward(gradient, out, lse, chosen)
    chosen, how = fitted("backward", chosen)
    q, k, v, blocks = chosen.q, chosen.k, chosen.v, chosen.blocks
    d, d_v, chunk = q.shape[-1], v.shape[-1], how.chunk
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
    delta = (gradient.float() * out.float()).sum(-1)
    sizes = {**of_keys(q, k), **of_values(v), **launched(how), "BLOCK": chosen.block}
    widen = {"WIDEN": sizes.pop("WIDEN")}
    part_bytes = 4 * (d + -(-chosen.block * (d + d_v) // chunk))
    for of in segments(chosen, how, part_bytes, shared=True):
        mine, rows = (of.part, of.heads), of.entries * chosen.group
        its_dk, its_dv = dk[:, of.kv], dv[:, of.kv]
        partial = dk.new_empty(rows, d)
        further = rows // chunk * chosen.block
        further_k, further_v = dk.new_empty(further, d), dk.new_empty(further, d_v)
        for attempt in Attempt.both((of.item_row.numel(),), how, q):
            kernels.backward[attempt.grid](
                *(q[mine], k[:, of.kv], v[:, of.kv], gradient[mine], lse[mine], delta[mine]),
                *(partial, its_dk, its_dv, further_k, further_v),
                *(of.table.rows, of.table.query, of.item_row, of.item_chunk, of.further),
                *(blocks.first, blocks.length, chosen.queries.last[of.part], attempt.odd),
                *(chosen.scale, blocks.first.numel()),
                **{**sizes, **widen, **launched(attempt.how)},
                ROWS=how.rows,
                CHUNK=chunk,
                AGAIN=attempt.again,
            )
        if further:
            kernels.add_chunks[(of.table.rows.numel() - 1,)](
                *(its_dk, its_dv, further_k, further_v, of.further),
                *(blocks.first, blocks.length, blocks.first.numel()),
                **sizes,
            )
        kv_heads, queries, _ = of.table.place.shape
        kernels.sum_parts[(of.part.stop - of.part.start, kv_heads)](
            *(partial, of.table.rows, of.table.place, dq[mine], queries),
            **of_group(chosen),
            D=d,
            PAD=padded(d),
        )
        del of, partial, further_k, further_v
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def select(
    q: Tensor,
    entries: Tensor,
    low: Tensor,
    high: Tensor,
    queries: Queries,
    shape: SparseShape,
    scale: float,
    lse: Tensor | None,
) -> Tensor:
    """The best blocks of each query, ``[kv_heads, queries, top]`` int32, ascending.

    It sees ``entries[low:high]``, of which all of a sequence have one beginning.
    """
    from trimtab.kernels.sparse import triton_select as kernels

    kv_heads = entries.shape[1]
    out = torch.empty(kv_heads, q.shape[0], shape.top, dtype=torch.int32, device=q.device)
    need, kept = Need.of(q, entries), padded(shape.top)
    how = tile("select", need, shape.block)
    tiles = tables.cut(queries.ends, q.shape[0], how.rows)
    common = {**of_keys(q, entries), "QUERIES": how.rows}
    if lse is None:
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        kernels.entry_logarithms[(tiles.first.numel(), q.shape[1])](
            *(q, entries, lse, tiles.first, tiles.length, low, high, scale),
            **common,
            **launched(how),
            ENTRIES=how.columns,
        )
    lse = lse.float().contiguous()
    kernels.best_blocks[(tiles.first.numel(), kv_heads)](
        *(q, entries, lse, out, tiles.first, tiles.length, low, high, queries.own),
        *(q.shape[0], scale),
        **common,
        **launched(choice_tile(how, need, kept)),
        PER_BLOCK=shape.entries_per_block,
        REACH=shape.reach,
        OUTER=shape.window // shape.stride,
        FIRST=shape.first,
        RECENT=shape.recent,
        TOP=shape.top,
        KEPT=kept,
    )
    return out
