"""The sum of rows by Triton where it can run, else in torch."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

from torch import Tensor

from trimtab.kernels.sums import naive

UNROLLED = 16
"""The most rows whose loads are written out; the rest is a loop."""

BLOCK, WARPS = 1024, 4
"""Elements and warps of a program: in 16 bits 16 bytes for each thread."""


def add_rows(own: Tensor, rows: Tensor) -> None:
    """Adds rows to ``own`` in place, in their order.

    Numbers of 16 bits are added in float32 and rounded once; others in their own type.

    Args:
        own: (L), contiguous.
        rows: (K, L), of the same type and device, each row contiguous.

    Raises:
        ValueError: the sizes or types do not fit.
    """
    if own.dim() != 1 or rows.dim() != 2 or rows.shape[1] != own.shape[0]:
        raise ValueError(
            f"add_rows: rows {tuple(rows.shape)} are not (K, L) of own {tuple(own.shape)}, (L)"
        )
    if rows.dtype != own.dtype or rows.device != own.device:
        raise ValueError(
            f"add_rows: rows are {rows.dtype} on {rows.device}, own is {own.dtype} on {own.device}"
        )
    if own.numel() and (own.stride(0) != 1 or (len(rows) and rows.stride(1) != 1)):
        raise ValueError("add_rows: own and each row must be contiguous")
    if not ((own.is_cuda and _has_triton()) or _interpreted()):
        naive.add_rows(own, rows)
    elif own.numel() and len(rows):
        _by_triton(own, rows)


def _by_triton(own: Tensor, rows: Tensor) -> None:
    import triton

    from trimtab.kernels.sums import triton_sums

    length, count = own.numel(), len(rows)
    triton_sums.add_rows[(triton.cdiv(length, BLOCK),)](
        *(own, rows, length, rows.stride(0), count),
        UNROLLED=min(count, UNROLLED),
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
