"""Sparse prefill: long prompts of dense models attend to the blocks that matter."""

from trimtab.sparse.config import SparseConfig

__all__ = ["SparseConfig"]
