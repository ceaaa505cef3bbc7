"""From the options to the kernels' own words."""

from __future__ import annotations

from trimtab.kernels.sparse.selectors import COUNTED, Selection
from trimtab.sparse.config import SparseConfig

EVERYTHING = Selection("fixed", stride=1)
"""What layers that stay dense keep."""


def selection(config: SparseConfig) -> Selection:
    """Which blocks are kept."""
    return Selection(
        config.selector,
        config.mass,
        config.top,
        config.first,
        config.recent,
        config.stride,
        config.by,
    )


def keeps_everything(config: SparseConfig) -> bool:
    """Whether no block is ever left out."""
    if config.selector == "fixed":
        return config.stride == 1
    return config.selector not in COUNTED and config.mass >= 1
