"""YAML to plain data with the line of each key, in bounded work."""

from __future__ import annotations

import dataclasses
from typing import Any, NoReturn

import yaml

from trimtab.core.errors import BadInput
from trimtab.core.wording import KeyPath, LineMap, shown

MAX_NODES = 100_000
MAX_DEPTH = 64

_Loader: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def parse_yaml(text: str, *, where: str, max_nodes: int = MAX_NODES) -> tuple[Any, LineMap]:
    """Plain data from YAML text, and the line of each key.

    The work is bounded by ``max_nodes`` and `MAX_DEPTH`, counted with every alias expanded.

    Raises:
        BadInput: the text is no YAML, repeats a key, holds several documents or is too large.
    """
    reader = _YamlReader(where, max_nodes)
    try:
        for event in yaml.parse(text, Loader=_Loader):
            reader.feed(event)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise BadInput(f"this is no YAML: {error.problem}", where=f"{where}:{line}") from None
    except yaml.YAMLError as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"this is no YAML: {reason}", where=where) from None
    return reader.data, reader.lines


@dataclasses.dataclass(slots=True)
class _Open:
    """A mapping or list whose end has not been read yet."""

    value: dict[Any, Any] | list[Any]
    path: KeyPath
    anchor: str | None
    nodes_before: int
    key: Any = None
    awaits_value: bool = False
    merged: list[Any] = dataclasses.field(default_factory=list)


_MERGE = object()
_YAML_TAG = "tag:yaml.org,2002:"
_SCALAR_TAGS = frozenset(
    f"{_YAML_TAG}{kind}" for kind in ("str", "int", "float", "bool", "null", "timestamp", "binary")
)


class _YamlReader:
    """Builds data from YAML events without recursion, so that limits hold while it reads."""

    def __init__(self, where: str, max_nodes: int) -> None:
        self.data: Any = None
        self.lines: dict[KeyPath, int] = {}
        self._where, self._max_nodes = where, max_nodes
        self._open: list[_Open] = []
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._nodes = 0
        self._documents = 0
        self._constructor = yaml.constructor.SafeConstructor()
        self._resolver = yaml.resolver.Resolver()

    def feed(self, event: yaml.Event) -> None:
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                self._fail("a second document begins", line, "give one document in each file")
        elif isinstance(event, yaml.AliasEvent):
            self._alias(str(event.anchor), line)
        elif isinstance(event, yaml.ScalarEvent):
            self._count(1, line)
            value = self._scalar(event, line)
            if event.anchor:
                self._anchors[event.anchor] = (value, 1)
            self._add(value, line)
        elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            self._begin(event, line)
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            self._end()

    def _begin(self, event: yaml.MappingStartEvent | yaml.SequenceStartEvent, line: int) -> None:
        nodes_before = self._nodes
        self._count(1, line)
        if len(self._open) >= MAX_DEPTH:
            self._fail(f"nested deeper than {MAX_DEPTH} levels", line, "give a flatter document")
        value: dict[Any, Any] | list[Any] = {} if isinstance(event, yaml.MappingStartEvent) else []
        path = self._add(value, line)
        self._open.append(_Open(value, path, event.anchor, nodes_before))

    def _end(self) -> None:
        closed = self._open.pop()
        for source in closed.merged:
            for mapping in source if isinstance(source, list) else [source]:
                for key, value in mapping.items():
                    closed.value.setdefault(key, value)  # type: ignore[union-attr]
        if closed.anchor:
            self._anchors[closed.anchor] = (closed.value, self._nodes - closed.nodes_before)

    def _alias(self, anchor: str, line: int) -> None:
        if anchor not in self._anchors:
            self._fail(f"the alias *{anchor} has no anchor before it", line, "define it first")
        value, nodes = self._anchors[anchor]
        self._count(nodes, line)
        self._add(value, line)

    def _scalar(self, event: yaml.ScalarEvent, line: int) -> Any:
        tag = event.tag
        if tag in (None, "!"):
            kind, value, implicit = yaml.ScalarNode, event.value, event.implicit
            tag = self._resolver.resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        if tag == f"{_YAML_TAG}merge":
            return _MERGE
        if tag not in _SCALAR_TAGS:
            self._fail(f"the tag {shown(tag)} is not known", line, "leave it out")
        node = yaml.ScalarNode(tag, event.value, event.start_mark)  # type: ignore[arg-type]
        try:
            return self._constructor.construct_object(node)
        except (yaml.YAMLError, ValueError, LookupError, AttributeError):
            name = str(tag).removeprefix(_YAML_TAG)
            self._fail(f"{shown(event.value)} is no {name}", line, "quote it if it is text")

    def _add(self, value: Any, line: int) -> KeyPath:
        if not self._open:
            self.data = value
            self.lines[()] = line
            return ()
        parent = self._open[-1]
        if isinstance(parent.value, list):
            path = (*parent.path, len(parent.value))
            parent.value.append(value)
            self.lines[path] = line
            return path
        if not parent.awaits_value:
            self._set_key(parent, value, line)
            return parent.path
        parent.awaits_value = False
        if parent.key is _MERGE:
            self._merge(parent, value, line)
            return parent.path
        parent.value[parent.key] = value
        return (*parent.path, parent.key)

    def _set_key(self, parent: _Open, key: Any, line: int) -> None:
        if isinstance(key, dict | list):
            self._fail("a key is a mapping or a list", line, "give a plain key")
        if key in parent.value:
            self._fail(f"the key {shown(key)} is given twice", line, "give it once")
        parent.key, parent.awaits_value = key, True
        if key is not _MERGE:
            self.lines[(*parent.path, key)] = line

    def _merge(self, parent: _Open, value: Any, line: int) -> None:
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, dict) for part in parts):
            self._fail("<< merges something that is no mapping", line, "merge a mapping")
        parent.merged.append(value)

    def _count(self, nodes: int, line: int) -> None:
        self._nodes += nodes
        if self._nodes > self._max_nodes:
            self._fail(
                f"more than {self._max_nodes:,} values, with every alias expanded",
                line,
                "give a smaller document",
            )

    def _fail(self, what: str, line: int, fix: str) -> NoReturn:
        raise BadInput(what, where=f"{self._where}:{line}", fix=fix)
