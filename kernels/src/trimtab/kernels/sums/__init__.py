"""Sums of many operands in one pass, as collectives make them; each element in a fixed order.

`naive` is the mathematics in plain torch; on a GPU `add_rows` runs it by Triton.
"""

from trimtab.kernels.sums.launch import add_rows

__all__ = ["add_rows"]
