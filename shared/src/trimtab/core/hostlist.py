"""Slurm's short form of many host names: ``gpu[001-003,007],login1``."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from trimtab.core.errors import BadInput

MAX_HOSTS = 200_000


def expand(text: str, *, where: str = "") -> list[str]:
    """The host names of a hostlist, in its order.

    Args:
        text: names divided by commas, each with any number of bracketed ranges.
        where: what it comes from, for the error.

    Raises:
        BadInput: it is no hostlist, or names too many hosts.
    """
    names: list[str] = []
    for part in _parts(text, where):
        for name in _names(part, where):
            names.append(name)
            if len(names) > MAX_HOSTS:
                raise BadInput(f"there are more than {MAX_HOSTS:,} hosts", where=where)
    if not names:
        raise BadInput(f"{text[:80]!r} names no host", where=where, fix="write it as a[1-3],b")
    return names


def _parts(text: str, where: str) -> Iterator[str]:
    """What stands between the commas that are in no brackets."""
    matched = re.findall(r"(?:[^\[\],]|\[[^\[\]]*\])+|,", text.strip())
    if "".join(matched) != text.strip():
        raise BadInput(f"{text[:80]!r} has brackets that do not match", where=where)
    return (part.strip() for part in matched if part != ",")


def _names(part: str, where: str) -> Iterator[str]:
    pieces = re.split(r"\[([^\]]*)\]", part)
    choices = [
        list(_numbers(piece, where)) if at % 2 else [piece] for at, piece in enumerate(pieces)
    ]
    return ("".join(chosen) for chosen in itertools.product(*choices))


def _numbers(ranges: str, where: str) -> Iterator[str]:
    for word in ranges.split(","):
        found = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", word)
        if found is None or int(found[2] or found[1]) < int(found[1]):
            raise BadInput(
                f"[{ranges[:80]}] is no list of ranges", where=where, fix="write it as [1-3,7]"
            )
        first, last = int(found[1]), int(found[2] or found[1])
        if last - first >= MAX_HOSTS:
            raise BadInput(f"there are more than {MAX_HOSTS:,} hosts", where=where)
        yield from (f"{number:0{len(found[1])}d}" for number in range(first, last + 1))
