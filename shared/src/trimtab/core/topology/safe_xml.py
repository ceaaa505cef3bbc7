"""XML without document types or entities, in bounded work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn
from xml.parsers import expat

from trimtab.core.documents import shown
from trimtab.core.errors import BadInput

MAX_ELEMENTS = 200_000
MAX_DEPTH = 64


@dataclass(slots=True)
class Element:
    """One element, with the line it begins on."""

    tag: str
    attributes: Mapping[str, str]
    line: int
    children: list[Element] = field(default_factory=list)

    def each(self, tag: str) -> Iterator[Element]:
        """The elements of a tag below this one, in document order."""
        for child in self.children:
            if child.tag == tag:
                yield child
            yield from child.each(tag)


def parse_xml(text: str, *, where: str) -> Element:
    """The root element.

    Raises:
        BadInput: the text is no XML, has a document type or entities, or is too large.
    """
    return _Reader(where).read(text)


class _Reader:
    def __init__(self, where: str) -> None:
        self._where = where
        self._open: list[Element] = []
        self._root: Element | None = None
        self._count = 0
        self._parser = expat.ParserCreate()
        self._parser.StartElementHandler = self._begin
        self._parser.EndElementHandler = self._end
        self._parser.StartDoctypeDeclHandler = self._refuse_doctype
        self._parser.EntityDeclHandler = self._refuse_doctype

    def read(self, text: str) -> Element:
        try:
            self._parser.Parse(text.encode(), True)
        except expat.ExpatError as error:
            reason = expat.errors.messages[error.code]
            where = f"{self._where}:{error.lineno}"
            raise BadInput(f"this is no XML: {reason}", where=where) from None
        assert self._root is not None
        return self._root

    def _begin(self, tag: str, attributes: dict[str, str]) -> None:
        self._count += 1
        if self._count > MAX_ELEMENTS:
            self._fail(f"there are more than {MAX_ELEMENTS:,} elements", "give a smaller file")
        if len(self._open) >= MAX_DEPTH:
            self._fail(f"{shown(tag)} is nested too deeply", f"nest at most {MAX_DEPTH} levels")
        element = Element(tag, attributes, self._parser.CurrentLineNumber)
        if self._open:
            self._open[-1].children.append(element)
        else:
            self._root = element
        self._open.append(element)

    def _end(self, _tag: str) -> None:
        self._open.pop()

    def _refuse_doctype(self, *_: Any) -> NoReturn:
        self._fail("there is a document type or entity", "leave <!DOCTYPE and <!ENTITY out")

    def _fail(self, what: str, fix: str) -> NoReturn:
        raise BadInput(what, where=f"{self._where}:{self._parser.CurrentLineNumber}", fix=fix)
