"""What no function here takes: numbers, sizes and ends of sequences that do not fit together."""

from __future__ import annotations

from itertools import pairwise
from numbers import Integral
from typing import Any, get_args

import torch
from torch import Tensor


def check_numbers(least: int, **numbers: int) -> None:
    """Refuses what is no whole number, or too small.

    Args:
        least: what each may be at least.
        numbers: by the names that the caller gave them.

    Raises:
        ValueError: with the name and the number.
    """
    for name, number in numbers.items():
        if isinstance(number, torch.SymInt):
            continue
        if isinstance(number, bool) or not isinstance(number, Integral) or number < least:
            raise ValueError(f"{name} is {number!r}; give a whole number from {least} on")


def check_total(top: int, first: int, recent: int) -> None:
    """Refuses a number of blocks that does not hold the forced ones.

    Raises:
        ValueError: with the numbers.
    """
    if first + recent > top:
        raise ValueError(
            f"{first} first and {recent} recent blocks are more than top, {top}, which counts them"
        )


def check_choice(name: str, given: object, choices: Any) -> None:
    """Refuses what is none of a `Literal`.

    Raises:
        ValueError: with the name and all choices.
    """
    known = get_args(choices)
    if given not in known:
        raise ValueError(f"{name} {given!r} is none of {', '.join(map(repr, known))}")


def check_sizes(q: Tensor, k: Tensor, v: Tensor, keys: str = "k", values: str = "v") -> None:
    """Refuses queries, keys and values that do not fit together.

    Args:
        q: ``[queries, heads, d]``.
        k: ``[keys, kv_heads, d]``.
        v: ``[keys, kv_heads, d_v]``.
        keys: what the caller calls ``k``.
        values: what the caller calls ``v``.

    Raises:
        ValueError: with what is wrong.
    """
    check_shapes(q, k, v, keys, values)
    if q.dtype != k.dtype or k.dtype != v.dtype:
        raise ValueError(
            f"q, {keys} and {values} are {q.dtype}, {k.dtype} and {v.dtype}; give one dtype"
        )


def check_shapes(q: Tensor, k: Tensor, v: Tensor, keys: str = "k", values: str = "v") -> None:
    """Does what `check_sizes` does, whatever the types are."""
    for name, x, sizes in (("q", q, "heads, size"), (keys, k, _OF_KEYS), (values, v, _OF_KEYS)):
        check_packed(name, x, sizes)
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} heads do not divide into {k.shape[1]} KV heads")
    if k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)}, {keys} {tuple(k.shape)} and {values} {tuple(v.shape)} do not"
            " fit together; they must be [queries, heads, d], [keys, kv_heads, d] and"
            " [keys, kv_heads, d_v]"
        )


_OF_KEYS = "kv_heads, size"


def check_packed(name: str, x: Tensor, sizes: str) -> None:
    """Refuses what does not hold tokens of packed sequences, and two sizes beside.

    Raises:
        ValueError: with the name.
    """
    if x.dim() != 3:
        raise ValueError(
            f"{name} has {x.dim()} dimensions; it needs 3, [tokens, {sizes}], the sequences of a"
            " batch end to end"
        )


def check_ends(cu_queries: Tensor, cu_keys: Tensor, queries: int, keys: int | None = None) -> None:
    """Refuses ends of packed sequences that do not fit their tokens.

    Numbers are looked at on a CPU alone, where nothing has to be waited for, and not while torch
    traces.

    Args:
        cu_queries: ``[sequences + 1]``.
        cu_keys: the same of the keys.
        queries: tokens that ``cu_queries`` must tell of.
        keys: tokens that ``cu_keys`` may tell of at most; unknown by default.

    Raises:
        ValueError: with what is wrong.
    """
    for name, cu in (("cu_queries", cu_queries), ("cu_keys", cu_keys)):
        check_form(name, cu)
    if cu_queries.shape != cu_keys.shape:
        raise ValueError("cu_queries and cu_keys name different numbers of sequences")
    ends, key_ends = _known(cu_queries), _known(cu_keys)
    if ends is not None:
        _check_order("cu_queries", ends)
        if ends[-1] != queries:
            raise ValueError(f"cu_queries ends at {ends[-1]}; it must end at the {queries} queries")
    if key_ends is not None:
        _check_order("cu_keys", key_ends)
        if keys is not None and key_ends[-1] > keys:
            raise ValueError(f"cu_keys ends at {key_ends[-1]}; there are {keys} keys")
    if ends is None or key_ends is None:
        return
    for number, (own, seen) in enumerate(zip(_lengths(ends), _lengths(key_ends), strict=True)):
        if own > seen:
            raise ValueError(
                f"sequence {number} has {own} queries and {seen} keys; it needs a key a query"
            )


def check_entries(
    cu_entries: Tensor, cu_keys: Tensor, entries: int, window: int, stride: int
) -> None:
    """Refuses ends of compressed entries that do not fit them or the keys, as `check_ends` does.

    Args:
        cu_entries: ``[sequences + 1]``.
        cu_keys: the same of the raw keys.
        entries: how many there are, which may be more.
        window: tokens behind an entry.
        stride: tokens between the beginnings of two.

    Raises:
        ValueError: with what is wrong.
    """
    check_form("cu_entries", cu_entries)
    if cu_entries.shape != cu_keys.shape:
        raise ValueError("cu_entries and cu_keys name different numbers of sequences")
    ends, key_ends = _known(cu_entries), _known(cu_keys)
    if ends is None or key_ends is None:
        return
    _check_order("cu_entries", ends)
    if ends[-1] > entries:
        raise ValueError(f"cu_entries ends at {ends[-1]}; there are {entries} entries")
    for number, (own, keys) in enumerate(zip(_lengths(ends), _lengths(key_ends), strict=True)):
        needed = max(0, (keys - window) // stride + 1)
        if own < needed:
            raise ValueError(
                f"sequence {number} has {own} entries; its {keys} keys make {needed} of them"
            )


def check_form(name: str, cu: Tensor) -> None:
    """Refuses ends of sequences of another shape or type.

    Raises:
        ValueError: with what is wrong.
    """
    if cu.dim() != 1 or cu.shape[0] == 0 or cu.is_floating_point() or cu.dtype == torch.bool:
        raise ValueError(
            f"{name} is {tuple(cu.shape)} in {cu.dtype}; it must be [sequences + 1] whole numbers"
        )


def _known(cu: Tensor) -> list[int] | None:
    """Its numbers, or None where they would have to be waited for or do not exist yet."""
    if torch.compiler.is_compiling() or type(cu) is not Tensor or cu.device.type != "cpu":
        return None
    numbers: list[int] = cu.tolist()
    return numbers


def _lengths(ends: list[int]) -> list[int]:
    return [stop - begin for begin, stop in pairwise(ends)]


def _check_order(name: str, ends: list[int]) -> None:
    if ends[0] != 0:
        raise ValueError(f"{name} begins at {ends[0]}; it must begin at 0")
    if any(length < 0 for length in _lengths(ends)):
        raise ValueError(f"{name} decreases; each end must be at or behind the one before")


def check_gates(gates: Tensor, q: Tensor) -> None:
    """Refuses gates that do not fit the queries.

    Raises:
        ValueError: with what is wrong.
    """
    if gates.shape not in ((q.shape[0], q.shape[1], 3), (q.shape[0], 1, 3)):
        raise ValueError(
            f"gates is {tuple(gates.shape)}; it must be [queries, heads or 1, 3],"
            f" [{q.shape[0]}, {q.shape[1]} or 1, 3]"
        )
