"""FSA's published passes by the Triton kernels, in segments that fit a workspace.

A pass for maxima, and one whose parts are shifted by those so far and not yet normalised.
`published` is the same in torch, and says where this differs from the authors' code.
"""

from __future__ import annotations

from torch import Tensor

from trimtab.kernels.sparse.chosen import Chosen
from trimtab.kernels.sparse.launch import (
    Segment,
    fitted,
    of_group,
    of_values,
    pass_over_blocks,
    segments,
)
from trimtab.kernels.sparse.published import running_maxima


def forward(chosen: Chosen) -> tuple[Tensor, Tensor]:
    """Output and natural logarithm."""
    from trimtab.kernels.sparse.triton_selected import MAXIMA, SHIFTED

    chosen, how = fitted("published", chosen)
    out, lse = chosen.unwritten()
    width = chosen.v.shape[-1]
    for of in segments(chosen, how, (width + 2) * 4):
        entries = of.table.query.numel()
        maxima, sums = lse.new_zeros(entries, chosen.group), lse.new_empty(entries, chosen.group)
        partial = lse.new_empty(entries * chosen.group, width)
        pass_over_blocks(MAXIMA, chosen, how, of, (partial, maxima, sums))
        _, running = running_maxima(maxima, of.table.place)
        parts = partial, running, sums
        pass_over_blocks(SHIFTED, chosen, how, of, parts)
        _merge(chosen, of, parts, out, lse)
    return out, lse


def _merge(
    chosen: Chosen, of: Segment, parts: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor
) -> None:
    """Joins the parts of a segment's queries: outputs, what each is shifted by, and sums."""
    from trimtab.kernels.sparse import triton_selected as kernels

    kv_heads, queries, _ = of.table.place.shape
    kernels.merge[(of.part.stop - of.part.start, kv_heads)](
        *(*parts, of.table.rows, of.table.place),
        *(out[of.part, of.heads], lse[of.part, of.heads], queries),
        **of_group(chosen),
        **of_values(chosen.v),
    )
