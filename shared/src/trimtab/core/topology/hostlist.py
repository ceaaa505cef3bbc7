"""Slurm's hostlist expressions: ``a[1-3,5,07-12],b`` is a list of names."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence

from trimtab.core.documents import shown
from trimtab.core.errors import BadInput
from trimtab.core.topology.assumptions import MAX_HOSTS

_RANGE = re.compile(r"(\d{1,18})(?:-(\d{1,18}))?", re.ASCII)
_NAME = re.compile(r"[^\s,\[\]]*")
_NUMBERED = re.compile(r"(.*?)(\d{1,18})", re.ASCII | re.DOTALL)


def expand(text: str, *, where: str = "", limit: int = MAX_HOSTS) -> list[str]:
    """The names of a hostlist expression, in its order; a name given twice comes twice.

    Args:
        text: the expression; a name may have several brackets.
        where: the place it comes from, for the message.
        limit: how many names it may have.

    Raises:
        BadInput: it is malformed, or has more names than the limit.
    """
    names: list[str] = []
    for term in _terms(text, where):
        parts = _parts(term, where, limit)
        product = 1
        for part in parts:
            product *= len(part)
            if len(names) + product > limit:
                raise _too_many(term, where, limit)
        names += ("".join(choice) for choice in itertools.product(*parts))
    return names


def fold(names: Iterable[str]) -> str:
    """The hostlist expression of names in their order, with runs of numbers in brackets."""
    terms: list[str] = []
    for prefix, group in itertools.groupby(names, key=_stem):
        members = list(group)
        if len(members) == 1 or prefix is None:
            terms += members
        else:
            numbers = [name[len(prefix) :] for name in members]
            terms.append(f"{prefix}[{','.join(_runs(numbers))}]")
    return ",".join(terms)


def _stem(name: str) -> str | None:
    """What stands before a name's last number; None for a name that ends in none."""
    match = _NUMBERED.fullmatch(name)
    return match[1] if match else None


def _runs(numbers: Sequence[str]) -> list[str]:
    """Numbers that follow one another at one width, as ranges."""
    runs: list[list[str]] = []
    for number in numbers:
        if runs and number == str(int(runs[-1][-1]) + 1).zfill(len(runs[-1][0])):
            runs[-1].append(number)
        else:
            runs.append([number])
    return [run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]


def _terms(text: str, where: str) -> list[str]:
    """The parts between commas that are in no bracket."""
    terms, begin, open_brackets = [], 0, 0
    for index, letter in enumerate(text):
        if letter in "[]":
            open_brackets += 1 if letter == "[" else -1
            if open_brackets not in (0, 1):
                break
        elif letter == "," and not open_brackets:
            terms.append(text[begin:index].strip())
            begin = index + 1
    if open_brackets:
        raise BadInput(
            f"the brackets of {shown(text)} do not match", where=where, fix="write a[1-3,5]"
        )
    terms.append(text[begin:].strip())
    if not all(terms):
        raise BadInput(
            f"a name is missing in {shown(text)}", where=where, fix="put one name between commas"
        )
    return terms


def _parts(term: str, where: str, limit: int) -> list[list[str]]:
    """What stands at each place of a name: one text, or the numbers of a bracket."""
    parts: list[list[str]] = []
    for index, piece in enumerate(re.split(r"[\[\]]", term)):
        if index % 2:
            parts.append(_numbers(piece, term, where, limit))
        elif _NAME.fullmatch(piece):
            parts.append([piece])
        else:
            raise BadInput(f"{shown(term)} is no name", where=where, fix="leave spaces out")
    return parts


def _numbers(text: str, term: str, where: str, limit: int) -> list[str]:
    numbers: list[str] = []
    for piece in text.split(","):
        match = _RANGE.fullmatch(piece.strip())
        if match is None:
            raise BadInput(
                f"{shown(piece)} in {shown(term)} is no number or range",
                where=where,
                fix="write a[1-3,5,07-12]",
            )
        first, last = match[1], match[2] or match[1]
        if int(last) < int(first):
            raise BadInput(
                f"the range {piece.strip()} in {shown(term)} runs backwards",
                where=where,
                fix=f"write {last}-{first}",
            )
        if len(numbers) + int(last) - int(first) >= limit:
            raise _too_many(term, where, limit)
        numbers += (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
    return numbers


def _too_many(term: str, where: str, limit: int) -> BadInput:
    return BadInput(
        f"{shown(term)} stands for more than {limit:,} names",
        where=where,
        fix="give a smaller range",
    )
