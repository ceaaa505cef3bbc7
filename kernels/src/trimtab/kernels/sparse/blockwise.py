"""Selected attention in plain torch, a block of keys at a time for the queries that chose it.

What the Triton kernels do, in products of tiles: fast enough to train small models on a CPU.
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


def _segments(chosen: Chosen, row_bytes: int) -> Iterator[_Segment]:
    for part, table in chosen.segments(row_bytes):
        yield _segment(table, part, chosen, chosen.queries.last[part])


def _segment(table: BlockMajor, part: slice, chosen: Chosen, last: Tensor) -> _Segment:
    group, blocks = chosen.group, chosen.blocks.first.numel()
    items = tables.schedule(table, group, _ROWS)
    known = items.row >= 0
    row, chunk = items.row[known].long(), items.chunk[known].long()
    offset = torch.arange(_ROWS, device=last.device)
    at = (table.rows[row] * group + chunk * _ROWS)[:, None] + offset
    there = at < (table.rows[row + 1] * group)[:, None]
    at = at.masked_fill(~there, 0)
    query = table.query[at // group].long()
    head = (row // blocks)[:, None] * group + at % group
    where = torch.empty(table.query.numel() * group, dtype=torch.int64, device=last.device)
    where[at[there]] = there.flatten().nonzero()[:, 0]
    entry = table.place.long()
    member = torch.arange(group, device=last.device)
    place = where[(entry.clamp(min=0) * group)[..., None] + member]
    place = place.masked_fill((entry < 0)[..., None], -1).transpose(0, 1)
    heads = chosen.q.shape[1]
    return _Segment(part, row, query * heads + head, there, last[query], place)


@dataclass(frozen=True, slots=True)
class _Panels:
    """Keys and values by KV head and block, and where they came from."""

    token: Tensor
    """``[blocks, block]``."""
    inside: Tensor
    k: Tensor
    """``[kv_heads * blocks, block, d]``."""
    v: Tensor

    @classmethod
    def of(cls, chosen: Chosen) -> _Panels:
        blocks = chosen.blocks
        offset = torch.arange(chosen.block, device=blocks.first.device)
        inside = offset < blocks.length[:, None]
        token = (blocks.first[:, None] + offset).masked_fill(~inside, 0)

        def panels(x: Tensor) -> Tensor:
            gathered = wide(x)[token].masked_fill(~inside[..., None, None], 0.0)
            return gathered.permute(2, 0, 1, 3).flatten(0, 1)

        return cls(token, inside, panels(chosen.k), panels(chosen.v))

    def back(self, panels: Tensor, like: Tensor) -> Tensor:
        """Sums by panel as sums by token, ``[tokens, kv_heads, d]`` as ``like``."""
        by_block = panels.unflatten(0, (like.shape[1], -1)).permute(1, 2, 0, 3)
        out = torch.zeros_like(like)
        out[self.token[self.inside]] = by_block[self.inside].to(like.dtype)
        return out


def _visible(segment: _Segment, items: slice, panels: _Panels) -> Tensor:
    block = segment.item_row[items] % panels.token.shape[0]
    shown = panels.token[block][:, None] <= segment.last[items][..., None]
    shown &= panels.inside[block][:, None]
    return shown & segment.there[items][..., None]


def _chunks(segment: _Segment) -> Iterator[slice]:
    for begin in range(0, segment.item_row.numel(), _ITEMS):
        yield slice(begin, min(segment.item_row.numel(), begin + _ITEMS))


def forward(chosen: Chosen) -> tuple[Tensor, Tensor]:
    """Output and natural logarithm."""
    out, lse = chosen.unwritten()
    out.zero_(), lse.fill_(float("-inf"))
    panels = _Panels.of(chosen)
    width = chosen.v.shape[-1]
    for segment in _segments(chosen, (width + 8) * lse.element_size()):
        rows = chosen.q[segment.part].flatten(0, 1)
        parts = lse.new_empty(*segment.there.shape, width)
        logarithms = lse.new_empty(segment.there.shape)
        for items in _chunks(segment):
            panel = segment.item_row[items]
            parts[items], logarithms[items] = tiles.attend(
                wide(rows[segment.query_row[items]]),
                *(panels.k[panel], panels.v[panel], _visible(segment, items, panels)),
                chosen.scale,
            )
        _join(segment, parts.flatten(0, 1), logarithms.flatten(), out, lse)
    return out, lse


def _join(segment: _Segment, parts: Tensor, logarithms: Tensor, out: Tensor, lse: Tensor) -> None:
    """Joins the parts of each query, in the order of its slots."""
    absent = segment.place < 0
    if not logarithms.numel():
        return
    place = segment.place.clamp(min=0)
    each = logarithms[place].masked_fill(absent, float("-inf"))
    top = each.amax(2, keepdim=True).clamp(min=-1.0e30)
    weights = (each - top).exp()
    total = weights.sum(2, keepdim=True)
    lse[segment.part] = (top + total.log()).squeeze(2).flatten(1)
    weights /= total.masked_fill(total == 0, 1.0)
    joined = torch.zeros(*place.shape[:2], place.shape[3], parts.shape[-1]).to(parts)
    for slot in range(place.shape[2]):
        part = parts[place[:, :, slot]].masked_fill(absent[:, :, slot, :, None], 0.0)
        joined += part.mul_(weights[:, :, slot, :, None])
    out[segment.part] = joined.flatten(1, 2).to(out.dtype)


def backward(
    gradient: Tensor, out: Tensor, lse: Tensor, chosen: Chosen
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values; the probabilities come from the saved logarithms."""
    q = chosen.q
    dq = torch.zeros_like(q)
    panels = _Panels.of(chosen)
    dk, dv = torch.zeros_like(panels.k), torch.zeros_like(panels.v)
    delta = (wide(gradient) * wide(out)).sum(-1)
    for segment in _segments(chosen, (q.shape[-1] + 8) * lse.element_size()):
        part = segment.part
        rows, above = q[part].flatten(0, 1), gradient[part].flatten(0, 1)
        its_lse, its_delta = lse[part].flatten(), delta[part].flatten()
        parts = lse.new_empty(*segment.there.shape, q.shape[-1])
        for items in _chunks(segment):
            panel, row = segment.item_row[items], segment.query_row[items]
            parts[items], more_k, more_v = tiles.differentiate(
                *(wide(rows[row]), panels.k[panel], panels.v[panel]),
                *(_visible(segment, items, panels), chosen.scale),
                *(wide(above[row]), its_lse[row], its_delta[row]),
            )
            dk.index_add_(0, panel, more_k)
            dv.index_add_(0, panel, more_v)
        if parts.numel():
            _add_up(segment, parts.flatten(0, 1), dq)
    return dq, panels.back(dk, chosen.k), panels.back(dv, chosen.v)


def _add_up(segment: _Segment, parts: Tensor, dq: Tensor) -> None:
    place = segment.place
    joined = torch.zeros(*place.shape[:2], place.shape[3], parts.shape[-1]).to(parts)
    for slot in range(place.shape[2]):
        at = place[:, :, slot]
        joined += parts[at.clamp(min=0)].masked_fill_((at < 0)[..., None], 0.0)
    dq[segment.part] = joined.flatten(1, 2).to(dq.dtype)
