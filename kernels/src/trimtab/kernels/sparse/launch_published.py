"""The Triton kernels of FSA's published passes, launched in segments that fit a workspace."""

from __future__ import annotations

from torch import Tensor

from trimtab.kernels.sparse import tables
from trimtab.kernels.sparse.chosen import Chosen
from trimtab.kernels.sparse.launch import fitted, launched, of_group, of_keys, of_values
from trimtab.kernels.sparse.published import running_maxima


def forward(chosen: Chosen) -> tuple[Tensor, Tensor]:
    """Output and natural logarithm."""
    from trimtab.kernels.sparse import triton_published as kernels
    from trimtab.kernels.sparse.triton_selected import merge

    chosen, how = fitted("published", chosen)
    q, k, v, blocks = chosen.q, chosen.k, chosen.v, chosen.blocks
    out, lse = chosen.unwritten()
    sizes = {**of_keys(q, k), **launched(how), "BLOCK": chosen.block, "ROWS": how.rows}
    for part, table in chosen.segments((v.shape[-1] + 2) * 4):
        items = tables.schedule(table, chosen.group, how.rows)
        entries = table.query.numel()
        maxima, sums = lse.new_zeros(entries, chosen.group), lse.new_empty(entries, chosen.group)
        partial = lse.new_empty(entries * chosen.group, v.shape[-1])
        lists = (
            *(table.rows, table.query, items.row, items.chunk),
            *(blocks.first, blocks.length, chosen.queries.last[part]),
            *(chosen.scale, blocks.first.numel()),
        )
        grid = (items.row.numel(),)
        kernels.maxima[grid](*(q[part], k, maxima, *lists), **sizes)
        _, running = running_maxima(maxima, table.place)
        kernels.forward[grid](
            *(q[part], k, v, partial, running, sums, *lists), **sizes, **of_values(v)
        )
        merge[(part.stop - part.start, k.shape[1])](
            *(partial, running, sums, table.place, out[part], lse[part], part.stop - part.start),
            **of_group(chosen),
            **of_values(v),
            NORMALISED=False,
        )
    return out, lse
