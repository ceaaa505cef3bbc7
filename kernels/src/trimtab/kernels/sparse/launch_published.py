"""The Triton kernels of FSA's published passes, launched in segments that fit a workspace."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.kernels.sparse import tables
from trimtab.kernels.sparse.launch import FORWARD, MERGE, block_sizes, segments
from trimtab.kernels.sparse.published import running_maxima
from trimtab.kernels.sparse.tables import Blocks, Queries


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ids: Tensor,
    block: int,
    scale: float,
    queries: Queries,
    blocks: Blocks,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Output and natural logarithm; ids are numbered through."""
    from trimtab.kernels.sparse import triton_published as kernels

    out = q.new_empty(*q.shape[:2], v.shape[-1])
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    sizes = block_sizes(q, k, v, block)
    of_values = {name: sizes[name] for name in ("D_V", "PAD_V")}
    of_keys = {name: size for name, size in sizes.items() if name not in of_values}
    launched = {"ROWS": FORWARD.rows, "num_warps": FORWARD.warps, "num_stages": FORWARD.stages}
    top, group = ids.shape[-1], sizes["GROUP"]
    bytes_per_query = q.shape[1] * top * (v.shape[-1] + 2) * 4
    for part in segments(q.shape[0], bytes_per_query, workspace_bytes):
        table = tables.block_major(ids[:, part], blocks.first.numel())
        items = tables.schedule(table, group, FORWARD.rows)
        entries = table.query.numel()
        maxima, sums = lse.new_zeros(entries, group), lse.new_empty(entries, group)
        partial = lse.new_empty(entries * group, v.shape[-1])
        lists = (
            *(table.rows, table.query, items.row, items.chunk),
            *(blocks.first, blocks.length, queries.last[part]),
        )
        grid = (items.row.numel(),)
        kernels.maxima[grid](
            *(q[part], k, maxima, *lists, scale, blocks.first.numel()), **of_keys, **launched
        )
        _, running = running_maxima(maxima, table.place)
        kernels.forward[grid](
            *(q[part], k, v, partial, running, sums, *lists, scale, blocks.first.numel()),
            **sizes,
            **launched,
        )
        kernels.merge[(part.stop - part.start, k.shape[1])](
            *(partial, running, sums, table.place, out[part], lse[part], part.stop - part.start),
            TOP=top,
            HEADS=q.shape[1],
            GROUP=group,
            GROUP_PAD=1 << (group - 1).bit_length(),
            **of_values,
            num_warps=MERGE.warps,
            num_stages=MERGE.stages,
        )
    return out, lse
