"""Selected attention in the passes of FSA as published (arXiv 2508.18224, section 3), in torch.

A pass for the maxima of each query in each of its blocks; running maxima over a query's blocks; the
main pass, a block of keys at a time, which writes partial outputs shifted by them; and a pass that
merges them. The index tables are compressed rows here, and every query has maxima of its own: the
authors' code shifts all queries by those of the first, which overflows in half precision.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trimtab.kernels.sparse.chosen import Chosen
from trimtab.kernels.sparse.tables import BlockMajor, Blocks
from trimtab.kernels.sparse.tiles import weighted, wide


def running_maxima(maxima: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest maximum of a query up to each of its blocks.

    Args:
        maxima: of each entry of the table and head of the group ``[entries, group]``.
        place: the entry of each slot ``[kv_heads, queries, top]``, -1 if it is empty.

    Returns:
        By slot ``[kv_heads, queries, top, group]``, minus infinity before the first block; and by
        entry, as large as ``maxima``.
    """
    there = place >= 0
    by_slot = maxima[place.clamp(min=0).long()].masked_fill(~there[..., None], float("-inf"))
    running = by_slot.cummax(2).values
    by_entry = torch.zeros_like(maxima)
    by_entry[place[there].long()] = running[there]
    return running, by_entry


def forward(chosen: Chosen) -> tuple[Tensor, Tensor]:
    """Output and natural logarithm."""
    q, k, v = chosen.q, wide(chosen.k), wide(chosen.v)
    out, lse = chosen.unwritten()
    for part, table in chosen.segments((v.shape[-1] + 2) * lse.element_size()):
        out[part], lse[part] = _segment(
            *(wide(q[part]) * chosen.scale, k, v, table, chosen.blocks),
            *(chosen.queries.last[part], chosen.block),
        )
    return out, lse


def _segment(
    q: Tensor, k: Tensor, v: Tensor, table: BlockMajor, blocks: Blocks, last: Tensor, block: int
) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    entries = table.query.numel()
    maxima = q.new_zeros(entries, group)
    for rows, logits, _ in _blocks(q, k, v, table, blocks, last, block):
        maxima[rows] = logits.amax(-1)
    running, shift = running_maxima(maxima, table.place)
    parts, sums = q.new_empty(entries, group, v.shape[-1]), q.new_empty(entries, group)
    for rows, logits, values in _blocks(q, k, v, table, blocks, last, block):
        p = torch.exp(logits - shift[rows, :, None])
        flat, visible = p.flatten(0, 1)[None], ~logits.isneginf().flatten(0, 1)[None]
        parts[rows] = weighted(flat, values[None], visible)[0].unflatten(0, p.shape[:2])
        sums[rows] = p.sum(-1)
    return _merge(table.place, running, parts, sums)


def _blocks(
    q: Tensor, k: Tensor, v: Tensor, table: BlockMajor, blocks: Blocks, last: Tensor, block: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Entries, logits ``[queries, group, keys]`` and values of each KV head and block."""
    group, count = q.shape[1] // k.shape[1], blocks.first.numel()
    bounds = table.rows.tolist()
    for row in range(len(bounds) - 1):
        rows = slice(bounds[row], bounds[row + 1])
        if rows.start == rows.stop:
            continue
        kv_head, number = divmod(row, count)
        begin = int(blocks.first[number])
        keys = slice(begin, begin + min(block, int(blocks.length[number])))
        query = table.query[rows].long()
        heads = slice(kv_head * group, (kv_head + 1) * group)
        logits = q[query, heads] @ k[keys, kv_head].T
        hidden = torch.arange(keys.start, keys.stop, device=q.device) > last[query][:, None]
        yield rows, logits.masked_fill(hidden[:, None], float("-inf")), v[keys, kv_head]


def _merge(place: Tensor, running: Tensor, parts: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    kv_heads, queries, top = place.shape
    shape = (kv_heads, queries, running.shape[-1])
    acc, total = parts.new_zeros(*shape, parts.shape[-1]), parts.new_zeros(shape)
    before = torch.full_like(total, float("-inf"))
    for slot in range(top):
        there = (place[..., slot] >= 0)[..., None]
        entry = place[..., slot].clamp(min=0).long()
        kept = torch.exp(before - running[:, :, slot]).masked_fill(~there, 1.0)
        acc = acc * kept[..., None] + parts[entry].masked_fill(~there[..., None], 0.0)
        total = total * kept + sums[entry].masked_fill(~there, 0.0)
        before = running[:, :, slot]
    out = acc / total.masked_fill(total == 0, 1.0)[..., None]
    lse = torch.where(total > 0, before + total.log(), float("-inf"))
    return out.transpose(0, 1).flatten(1, 2), lse.transpose(0, 1).flatten(1, 2)
