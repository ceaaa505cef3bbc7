"""From the options to the kernels' own words."""

from __future__ import annotations

from trimtab.kernels.sparse.selectors import Selection
from trimtab.sparse.config import SparseConfig


def selection(config: SparseConfig) -> Selection:
    """Which blocks are kept."""
    return Selection(config.selector, config.mass, config.top, config.first, config.recent)


def keeps_everything(config: SparseConfig) -> bool:
    """Whether no block is ever left out."""
    return config.selector != "top" and config.mass >= 1
