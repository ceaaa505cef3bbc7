"""The sum of rows in plain torch: the reference of the kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """In which type operands are added: float32 for narrower numbers, else their own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def add_rows(own: Tensor, rows: Tensor) -> None:
    """Adds rows (K, L) to ``own`` (L) in place: one after the other, rounded once at the end."""
    total = own.to(accumulator(own.dtype))
    for row in rows:
        total = total + row.to(total.dtype)
    own.copy_(total)
