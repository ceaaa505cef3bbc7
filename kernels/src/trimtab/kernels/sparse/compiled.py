"""Compiled code for CPUs: the best that was built and that this machine can run, or none."""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

_SETS = ("avx512bf16", "avx512", "avx2", "portable")
logger = logging.getLogger(__name__)

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Types that compiled code knows, and by which number."""


@cache
def library(
    name: str,
    sizes: tuple[tuple[str, int], ...],
    instead: str,
    folder: Path = Path(__file__).parent,
) -> ctypes.CDLL | None:
    """The best build of one source, or None where there is none; then a line in the log says why.

    Args:
        name: of the source, ``NAME.cpp``; its builds are ``NAME_SET.SUFFIX``.
        sizes: functions that tell the bytes of its structures, and what they must tell: code of
            an older source must not be called.
        instead: what is slow without it, for the log.
        folder: where the builds lie.
    """
    found, faults = None, []
    for path in (folder / f"{name}_{s}{suffix}" for s in _SETS for suffix in EXTENSION_SUFFIXES):
        if not path.exists():
            continue
        try:
            code = ctypes.CDLL(str(path))
        except OSError as error:
            faults.append(str(error))
            continue
        if not all(hasattr(code, of) and getattr(code, of)() == size for of, size in sizes):
            faults.append(f"{path.name} was built from another source")
        elif code.trimtab_supported():
            found = code
            break
    if faults or found is None:
        how = "plain torch, which is slow" if found is None else "a slower build"
        why = "; ".join(faults) or f"none in {folder} is for this machine"
        logger.warning("%s by %s: no compiled code (%s)", instead, how, why)
    return found


def pointing(problem: ctypes.Structure, tensors: dict[str, Tensor]) -> None:
    """Sets a structure's pointers; the tensors must outlive its use."""
    for name, tensor in tensors.items():
        setattr(problem, name, tensor.data_ptr())


def pointers(*names: str) -> tuple[tuple[str, type[ctypes.c_void_p]], ...]:
    """Fields of a structure that are pointers."""
    return tuple((name, ctypes.c_void_p) for name in names)


def integers(*names: str) -> tuple[tuple[str, type[ctypes.c_int64]], ...]:
    """Fields of a structure that are 64-bit integers."""
    return tuple((name, ctypes.c_int64) for name in names)
