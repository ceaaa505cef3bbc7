"""Sparse attention: queries that attend to the blocks they choose, for any number of heads a group.

`naive` is the mathematics; the operators below run it by Triton on GPUs and by torch on CPUs.
"""

from trimtab.kernels.sparse.operators import (
    WORKSPACE_BYTES,
    select_blocks,
    selected_attention,
)
from trimtab.kernels.sparse.shape import SparseShape

__all__ = ["WORKSPACE_BYTES", "SparseShape", "select_blocks", "selected_attention"]
