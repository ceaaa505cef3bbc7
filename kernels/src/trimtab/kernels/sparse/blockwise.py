"""Selected attention in plain torch, a block of keys at a time for the queries that chose it.

What the Triton kernels do, in products of tiles: fast enough to train small models on a CPU. All
that is allocated beside the results, and the sums of gradients of keys and values, keeps to the
workspace, but for what one query and one tile need.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.kernels.sparse import tables, tiles
from trimtab.kernels.sparse.chosen import Chosen
from trimtab.kernels.sparse.tables import BlockMajor
from trimtab.kernels.sparse.tiles import wide

_ROWS = 64
_ITEMS = 128
_TABLE_BYTES = 72
"""What an entry of the table takes at most while the table is made."""
_ROW_BYTES = 17
"""Of a segment for each row of its tiles, and what more it takes to make that."""
_ROW_MAKING_BYTES = 48


@dataclass(frozen=True, slots=True)
class _Segment:
    """Some queries, and the tiles in which they meet the blocks they chose."""

    part: slice
    item_row: Tensor
    """The KV head and block of each tile, ``[items]``."""
    query_row: Tensor
    """Which query and head a row of a tile is, in the segment's queries; ``[items, rows]``."""
    there: Tensor
    last: Tensor
    """The key that each row's query belongs to, ``[items, rows]``."""
    place: Tensor
    """Where each query's parts lie among all rows: ``[queries, kv_heads, top, group]``, -1."""


@dataclass(frozen=True, slots=True)
class _Room:
    """What fits the workspace."""

    chosen: Chosen
    width: int
    """Numbers of a partial result."""
    backward: bool

    @property
    def items(self) -> int:
        """Tiles that are done at once, in a quarter of the workspace."""
        return max(1, min(_ITEMS, self.chosen.workspace_bytes // 4 // self._item_bytes))

    @property
    def queries(self) -> int:
        """Queries of a segment, if all tiles were full."""
        rows = self.chosen.q.shape[1] * self.chosen.top
        return max(1, self.chosen.workspace_bytes // max(1, self.segment_bytes(1, rows)))

    def fits(self, queries: int, rows: int) -> bool:
        """Whether a segment of so many queries and rows of tiles does; one query always does."""
        left = self.chosen.workspace_bytes - self.items * self._item_bytes
        lists = 48 * self.chosen.k.shape[1] * self.chosen.blocks.first.numel()
        return queries == 1 or self.segment_bytes(queries, rows) + lists <= left

    def segment_bytes(self, queries: int, rows: int) -> int:
        """At the worst of: making the table, the segment, all parts, and joining them."""
        q, group, item = self.chosen.q, self.chosen.group, self._wide
        entries = queries * self.chosen.k.shape[1] * self.chosen.top
        kept = entries * (8 + 8 * group) + rows * _ROW_BYTES
        made = entries * (16 + 24 * group) + rows * _ROW_MAKING_BYTES
        joined = queries * q.shape[1] * self.width * (3 * item + q.element_size())
        joined += entries * group * (9 + 5 * item)
        if self.backward:  # the products of outputs and gradients come before
            made += queries * q.shape[1] * (self.chosen.v.shape[-1] * 3 * item + item)
        parts = rows * (self.width + 1) * item
        return max(entries * _TABLE_BYTES, kept + made, kept + parts + joined)

    @property
    def _wide(self) -> int:
        return 8 if self.chosen.q.dtype == torch.float64 else 4

    @property
    def _item_bytes(self) -> int:
        """Of one tile: queries, keys, values and products, as they are and in the type of sums."""
        d, d_v, block = self.chosen.q.shape[-1], self.chosen.v.shape[-1], self.chosen.block
        own, item = self.chosen.q.element_size(), self._wide
        panels = block * (d + d_v) * (own + 3 * item) + block * 40
        if not self.backward:
            return panels + _ROWS * (d * (own + 2 * item) + d_v * item + block * (item + 5) + 40)
        panels += block * (2 * d + d_v) * item
        rows = d * (own + 3 * item) + d_v * (own + item) + block * (3 * item + 5) + 40
        return panels + _ROWS * rows


def _segments(room: _Room) -> Iterator[_Segment]:
    count = room.chosen.q.shape[0]
    step = room.queries
    waiting = [slice(at, min(count, at + step)) for at in range(0, count, step)][::-1]
    while waiting:
        part = waiting.pop()
        segment = _segment(room, part)
        if segment is not None:
            yield segment
            del segment  # before the next one is made
            continue
        middle = (part.start + part.stop) // 2
        waiting += [slice(middle, part.stop), slice(part.start, middle)]


def _segment(room: _Room, part: slice) -> _Segment | None:
    """The tiles of some queries, or None where they do not fit."""
    chosen = room.chosen
    group, blocks = chosen.group, chosen.blocks.first.numel()
    table = tables.block_major(chosen.ids[:, part], blocks)
    items = tables.schedule(table, group, _ROWS)
    known = items.row >= 0
    row, chunk = items.row[known].long(), items.chunk[known].long()
    if not room.fits(part.stop - part.start, row.numel() * _ROWS):
        return None
    offset = torch.arange(_ROWS, device=row.device)
    at = (table.rows[row] * group + chunk * _ROWS)[:, None] + offset
    there = at < (table.rows[row + 1] * group)[:, None]
    at.masked_fill_(~there, 0)
    place = _places(table, at, there, group)
    query = table.query[at.div(group, rounding_mode="floor")].long()
    last = chosen.queries.last[part][query]
    query *= chosen.q.shape[1]
    query += (row // blocks * group)[:, None]
    query += at.remainder_(group)
    return _Segment(part, row, query, there, last, place)


def _places(table: BlockMajor, at: Tensor, there: Tensor, group: int) -> Tensor:
    where = torch.empty(table.query.numel() * group, dtype=torch.int64, device=at.device)
    where[at[there]] = there.flatten().nonzero()[:, 0]
    member = torch.arange(group, device=at.device)
    entry = (table.place.clamp(min=0).long() * group)[..., None] + member
    return where[entry].masked_fill_((table.place < 0)[..., None], -1).transpose(0, 1)


@dataclass(frozen=True, slots=True)
class _Panels:
    """The keys and values of some tiles."""

    head: Tensor
    """``[tiles]``."""
    token: Tensor
    """``[tiles, block]``."""
    inside: Tensor
    k: Tensor
    """``[tiles, block, d]``."""
    v: Tensor

    @classmethod
    def of(cls, chosen: Chosen, item_row: Tensor) -> _Panels:
        blocks = chosen.blocks.first.numel()
        head, block = item_row // blocks, item_row % blocks
        offset = torch.arange(chosen.block, device=item_row.device)
        inside = offset < chosen.blocks.length[block][:, None]
        token = (chosen.blocks.first[block][:, None] + offset).masked_fill_(~inside, 0)

        def panels(x: Tensor) -> Tensor:
            return wide(x[token, head[:, None]]).masked_fill_(~inside[..., None], 0.0)

        return cls(head, token, inside, panels(chosen.k), panels(chosen.v))


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums of gradients by KV head and block, ``[kv_heads * blocks, block, d]``."""

    chosen: Chosen
    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, chosen: Chosen) -> _Sums:
        panels = chosen.k.shape[1] * chosen.blocks.first.numel()
        sizes = (chosen.k.shape[-1], chosen.v.shape[-1])
        k, v = (wide(chosen.q[:0]).new_zeros(panels, chosen.block, size) for size in sizes)
        return cls(chosen, k, v)

    def by_token(self) -> tuple[Tensor, Tensor]:
        """As ``[tokens, kv_heads, d]``, a KV head at a time."""
        blocks = self.chosen.blocks
        offset = torch.arange(self.chosen.block, device=blocks.first.device)
        inside = offset < blocks.length[:, None]
        token = (blocks.first[:, None] + offset)[inside]
        results = []
        for sums, like in ((self.k, self.chosen.k), (self.v, self.chosen.v)):
            out = torch.zeros_like(like)
            for head, panels in enumerate(sums.unflatten(0, (like.shape[1], -1))):
                out[token, head] = panels[inside].to(like.dtype)
            results.append(out)
        return results[0], results[1]


def _visible(segment: _Segment, items: slice, panels: _Panels) -> Tensor:
    shown = panels.token[:, None] <= segment.last[items][..., None]
    shown &= panels.inside[:, None]
    shown &= segment.there[items][..., None]
    return shown


def _chunks(segment: _Segment, items: int) -> Iterator[slice]:
    for begin in range(0, segment.item_row.numel(), items):
        yield slice(begin, min(segment.item_row.numel(), begin + items))


def forward(chosen: Chosen) -> tuple[Tensor, Tensor]:
    """Output and natural logarithm."""
    out, lse = chosen.unwritten()
    out.zero_(), lse.fill_(float("-inf"))
    room = _Room(chosen, chosen.v.shape[-1], backward=False)
    for segment in _segments(room):
        parts = lse.new_empty(*segment.there.shape, room.width)
        logarithms = lse.new_empty(segment.there.shape)
        for items in _chunks(segment, room.items):
            _attend(chosen, segment, items, parts, logarithms)
        _join(segment, parts.flatten(0, 1), logarithms.flatten(), out, lse)
        del segment, parts, logarithms  # before the next ones are made
    return out, lse


def _attend(
    chosen: Chosen, segment: _Segment, items: slice, parts: Tensor, logarithms: Tensor
) -> None:
    panels = _Panels.of(chosen, segment.item_row[items])
    rows = chosen.q[segment.part].flatten(0, 1)
    parts[items], logarithms[items] = tiles.attend(
        wide(rows[segment.query_row[items]]),
        *(panels.k, panels.v, _visible(segment, items, panels), chosen.scale),
    )


def _join(segment: _Segment, parts: Tensor, logarithms: Tensor, out: Tensor, lse: Tensor) -> None:
    """Joins the parts of each query, in the order of its slots."""
    if not logarithms.numel():
        return
    absent = segment.place < 0
    weights = logarithms[segment.place.clamp(min=0)].masked_fill_(absent, float("-inf"))
    top = weights.amax(2, keepdim=True).clamp_(min=-1.0e30)
    weights.sub_(top).exp_()
    total = weights.sum(2, keepdim=True)
    lse[segment.part] = (top + total.log()).squeeze(2).flatten(1)
    weights /= total.masked_fill(total == 0, 1.0)
    joined = _added_up(segment, parts, weights)
    out[segment.part] = joined.flatten(1, 2).to(out.dtype)


def _added_up(segment: _Segment, parts: Tensor, weights: Tensor | None) -> Tensor:
    """Sums of each query's parts, ``[queries, kv_heads, group, width]``."""
    place = segment.place
    joined = parts.new_zeros(*place.shape[:2], place.shape[3], parts.shape[-1])
    for slot in range(place.shape[2]):
        at = place[:, :, slot]
        part = parts[at.clamp(min=0)].masked_fill_((at < 0)[..., None], 0.0)
        joined += part if weights is None else part.mul_(weights[:, :, slot, :, None])
    return joined


def backward(
    gradient: Tensor, out: Tensor, lse: Tensor, chosen: Chosen
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values; the probabilities come from the saved logarithms."""
    dq, sums = torch.zeros_like(chosen.q), _Sums.of(chosen)
    room = _Room(chosen, chosen.q.shape[-1], backward=True)
    for segment in _segments(room):
        part = segment.part
        delta = (wide(gradient[part]) * wide(out[part])).sum(-1)
        parts = lse.new_empty(*segment.there.shape, room.width)
        for items in _chunks(segment, room.items):
            _differentiate(chosen, segment, items, (gradient, lse[part], delta), parts, sums)
        if parts.numel():
            dq[part] = _added_up(segment, parts.flatten(0, 1), None).flatten(1, 2).to(dq.dtype)
        del segment, parts, delta  # before the next ones are made
    return dq, *sums.by_token()


def _differentiate(
    chosen: Chosen,
    segment: _Segment,
    items: slice,
    known: tuple[Tensor, Tensor, Tensor],
    parts: Tensor,
    sums: _Sums,
) -> None:
    """Adds some tiles to the gradients, from the output's, the logarithms and ``delta``."""
    gradient, lse, delta = known
    item_row, row = segment.item_row[items], segment.query_row[items]
    panels = _Panels.of(chosen, item_row)
    rows, above = (x[segment.part].flatten(0, 1) for x in (chosen.q, gradient))
    parts[items], more_k, more_v = tiles.differentiate(
        *(wide(rows[row]), panels.k, panels.v),
        *(_visible(segment, items, panels), chosen.scale),
        *(wide(above[row]), lse.flatten()[row], delta.flatten()[row]),
    )
    sums.k.index_add_(0, item_row, more_k)
    sums.v.index_add_(0, item_row, more_v)
