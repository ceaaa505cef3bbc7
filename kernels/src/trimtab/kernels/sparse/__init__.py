"""Sparse attention: queries that attend to the blocks they choose, for any number of heads a group.

`naive` is the mathematics; the operators below run it by Triton on GPUs and by torch on CPUs.
"""

from trimtab.kernels.sparse.branches import (
    compressed_attention,
    keep_selection,
    native_sparse_attention,
    sliding_attention,
)
from trimtab.kernels.sparse.operators import (
    WORKSPACE_BYTES,
    select_blocks,
    selected_attention,
)
from trimtab.kernels.sparse.paged import (
    paged_compressed_attention,
    paged_native_sparse_attention,
    paged_select_blocks,
    paged_selected_attention,
    paged_sliding_attention,
)
from trimtab.kernels.sparse.paging import NewTokens, Paging
from trimtab.kernels.sparse.shape import SparseShape
from trimtab.kernels.sparse.windows import Windows

__all__ = [
    "WORKSPACE_BYTES",
    "NewTokens",
    "Paging",
    "SparseShape",
    "Windows",
    "compressed_attention",
    "keep_selection",
    "native_sparse_attention",
    "paged_compressed_attention",
    "paged_native_sparse_attention",
    "paged_select_blocks",
    "paged_selected_attention",
    "paged_sliding_attention",
    "select_blocks",
    "selected_attention",
    "sliding_attention",
]
