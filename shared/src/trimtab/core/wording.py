"""How keys, values and names appear in messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

KeyPath = tuple[str | int, ...]
LineMap = Mapping[KeyPath, int]
"""The line, from 1, of each key and list item of a document."""


def nearest(name: str, known: Iterable[str]) -> str:
    """What would be right instead of ``name``: the nearest known name, or all of them if few."""
    names = sorted(known)
    folded = {candidate.casefold(): candidate for candidate in names}
    close = difflib.get_close_matches(name.casefold(), folded, n=1)
    if close:
        return f"the nearest known one is {folded[close[0]]!r}"
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"known are {', '.join(names[:20])}{more}" if names else "none is known"


def shown(value: object, limit: int = 60) -> str:
    """A value as it appears in a message, shortened."""
    if isinstance(value, str | bytes):
        value = value[: limit + 1]
    elif isinstance(value, Mapping):
        return f"a mapping of length {len(value)}"
    elif isinstance(value, Sequence):
        return f"a list of length {len(value)}"
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"


def dotted(path: KeyPath) -> str:
    """A key path as people write it, e.g. ``links[3].bandwidth``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def place(where: str, path: KeyPath, lines: LineMap | None) -> str:
    """``where`` with the line of the key, or of the nearest key around it that has one."""
    for end in range(len(path), -1, -1):
        if lines and path[:end] in lines:
            return f"{where}:{lines[path[:end]]}"
    return where
