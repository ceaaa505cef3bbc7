"""Values of a JSON document with the line they stand on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from trimtab.core.documents import (
    MAX_FILE_BYTES,
    KeyPath,
    LineMap,
    dotted,
    json_lines,
    place,
    shown,
)
from trimtab.core.errors import BadInput


@dataclass(frozen=True)
class Places:
    """A document's text, to find lines in once they are needed."""

    text: str
    source: str

    @cached_property
    def _lines(self) -> LineMap | None:
        return json_lines(self.text) if len(self.text) <= MAX_FILE_BYTES else None

    def at(self, *path: str | int) -> str:
        """The file and the line of a key; without a line in documents too large to look in."""
        return place(self.source, path, self._lines)

    def expect(self, value: Any, kind: type, *path: str | int) -> Any:
        """The value, if it is of a kind.

        Raises:
            BadInput: it is not.
        """
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            wanted = {dict: "a mapping", list: "a list", str: "text", int: "a number"}
            raise BadInput(
                f"{named(path)} is {shown(value)}",
                where=self.at(*path),
                fix=f"give {wanted.get(kind, kind.__name__)}",
            )
        return value


def named(path: KeyPath) -> str:
    """A key as it appears in a message."""
    return dotted(path) or "the document"


def text_of(mapping: Mapping[str, Any], key: str) -> str | None:
    """A text of a mapping; None where it is missing or no text."""
    value = mapping.get(key)
    return value if isinstance(value, str) else None
