"""Documents from and to the user: bounded reading, validation with file and line, atomic writing.

Every failure is one `BadInput` sentence that names the file, the line, the key, the value and what
would be right.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast, get_args, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from trimtab.core.errors import BadInput

MAX_FILE_BYTES = 16 * 2**20
MAX_NODES = 100_000
MAX_DEPTH = 64
MAX_LINE_BYTES = 2**20

KeyPath = tuple[str | int, ...]
LineMap = Mapping[KeyPath, int]
"""The line, from 1, of each key and list item of a document."""

M = TypeVar("M")

# pydantic's names for an unknown key, in models and in dataclasses.
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_Loader: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Document(BaseModel):
    """Base of the models that users write: immutable, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class InvalidValue(ValueError):
    """Raised by a model's validator when it knows better than pydantic where the fault is.

    Args:
        what: what is wrong, e.g. ``"link to the unknown node 'n9'"``.
        at: path of the key at fault, relative to the model that raises; the message begins with it.
        fix: what would be right.
    """

    def __init__(self, what: str, *, at: KeyPath = (), fix: str = "") -> None:
        self.what, self.at, self.fix = what, at, fix
        super().__init__(f"{what}; {fix}" if fix else what)


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


def validate(model: type[M], data: object, *, where: str, lines: LineMap | None = None) -> M:
    """Makes a model from plain data.

    Args:
        model: a pydantic model or a dataclass; one that forbids extra keys reports unknown ones.
        data: mappings, lists and scalars as read from the user.
        where: the file, or the place in a configuration, that the data comes from.
        lines: the line of each key, when the data was read from a file.

    Raises:
        BadInput: the first fault, and how many more there are.
    """
    return _validate(model, data, where, lambda: lines)


def _validate(model: type[M], data: object, where: str, lines: Callable[[], LineMap | None]) -> M:
    try:
        result: M = _adapter(cast(Any, model)).validate_python(data)
    except ValidationError as error:
        raise _bad_input(model, data, error, where, lines()) from None
    except RecursionError:
        raise BadInput("the data is nested too deeply", where=where) from None
    return result


@cache
def _adapter(model: Any) -> TypeAdapter[Any]:
    return TypeAdapter(model)


def read_yaml(path: str | Path, model: type[M]) -> M:
    """Reads a YAML file into a model.

    Raises:
        BadInput: the file cannot be read, is no YAML, is too large, or does not fit the model.
    """
    data, lines = parse_yaml(read_text(path), where=str(path))
    return validate(model, data, where=str(path), lines=lines)


def read_json(path: str | Path, model: type[M]) -> M:
    """Reads a JSON file into a model.

    Raises:
        BadInput: the file cannot be read, is no JSON, is too large, or does not fit the model.
    """
    text = read_text(path)
    data = parse_json(text, where=str(path))
    return _validate(model, data, str(path), lambda: json_lines(text))


def read_text(path: str | Path, *, max_bytes: int = MAX_FILE_BYTES) -> str:
    """Reads a UTF-8 file of at most ``max_bytes`` bytes that is not empty.

    Raises:
        BadInput: it is missing, a folder, unreadable, empty, too large or not UTF-8.
    """
    try:
        with open(path, "rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            content = b"" if size_bytes > max_bytes else file.read(max_bytes + 1)
    except OSError as error:
        raise unreadable(path, error) from None
    if size_bytes > max_bytes or len(content) > max_bytes:
        raise BadInput(
            f"the file is larger than {max_bytes:,} bytes",
            where=str(path),
            fix="give a smaller one",
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise BadInput(
            f"byte {content[error.start]:#04x} is not UTF-8",
            where=f"{path}:{line}",
            fix="give a UTF-8 text file",
        ) from None
    if not text.strip():
        raise BadInput("the file is empty", where=str(path))
    return text


def read_lines(
    path: str | Path, *, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers from 1, read one at a time.

    Lines that are blank are left out; the others come without their line end.

    Raises:
        BadInput: the file cannot be read, or a line is too long or not UTF-8.
    """
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(max_line_bytes + 1):
                number += 1
                if len(line) > max_line_bytes:
                    raise BadInput(
                        f"the line is longer than {max_line_bytes:,} bytes",
                        where=f"{path}:{number}",
                        fix="give one record on each line",
                    )
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise BadInput(
                        f"byte {line[error.start]:#04x} is not UTF-8",
                        where=f"{path}:{number}",
                        fix="give a UTF-8 text file",
                    ) from None
                if text.strip():
                    yield number, text
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: str | Path, error: OSError) -> BadInput:
    """Why a file cannot be read."""
    if isinstance(error, FileNotFoundError):
        return BadInput("there is no such file", where=str(path))
    if isinstance(error, IsADirectoryError):
        return BadInput("this is a folder", where=str(path), fix="give a file")
    if isinstance(error, PermissionError):
        return BadInput("the file may not be read", where=str(path), fix="check its permissions")
    return BadInput(f"the file cannot be read ({error.strerror or error})", where=str(path))


def parse_json(text: str, *, where: str, finite: bool = True) -> Any:
    """Plain data from JSON text; a repeated key is refused, and NaN and infinity if ``finite``.

    The line of a fault is given when the text has several.

    Raises:
        BadInput: the text is no JSON.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(items)
        if len(mapping) < len(items):
            keys = [key for key, _ in items]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise BadInput(f"the key {twice!r} is given twice", where=where, fix="give it once")
        return mapping

    def constant(name: str) -> float:
        if not finite:
            return float(name)
        raise BadInput(f"{name} is no JSON number", where=where, fix="give a finite number")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise BadInput(
            f"this is no JSON: {error.msg} in column {error.colno}",
            where=f"{where}:{error.lineno}" if "\n" in text else where,
        ) from None
    except RecursionError:
        raise BadInput("the JSON is nested too deeply", where=where) from None
    except ValueError as error:  # an integer of thousands of digits
        raise BadInput(f"this is no JSON: {error}", where=where) from None


def parse_yaml(text: str, *, where: str) -> tuple[Any, LineMap]:
    """Plain data from YAML text, and the line of each key.

    The work is bounded by `MAX_NODES` and `MAX_DEPTH`, counted with every alias expanded.

    Raises:
        BadInput: the text is no YAML, repeats a key, holds several documents or is too large.
    """
    reader = _YamlReader(where)
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

    def __init__(self, where: str) -> None:
        self.data: Any = None
        self.lines: dict[KeyPath, int] = {}
        self._where = where
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
        if self._nodes > MAX_NODES:
            self._fail(
                f"more than {MAX_NODES:,} values, with every alias expanded",
                line,
                "give a smaller document",
            )

    def _fail(self, what: str, line: int, fix: str) -> NoReturn:
        raise BadInput(what, where=f"{self._where}:{line}", fix=fix)


def json_lines(text: str) -> LineMap | None:
    """The lines of JSON text's keys; JSON is YAML but for rare cases, which go without lines."""
    with suppress(BadInput):
        return parse_yaml(text, where="")[1]
    return None


def _bad_input(
    model: type,
    data: object,
    error: ValidationError,
    where: str,
    lines: LineMap | None,
) -> BadInput:
    faults: dict[KeyPath, BadInput] = {}
    # A misspelt key is also a missing one; the spelling is what the user wants to hear of.
    details = sorted(error.errors(include_url=False), key=lambda d: d["type"] not in _UNKNOWN)
    for detail in details:
        path = _data_path(data, detail["loc"], missing=detail["type"] == "missing")
        what, fix, at = _fault(model, detail, path)
        faults.setdefault(path + at, BadInput(what, where=place(where, path + at, lines), fix=fix))
    first = next(iter(faults.values()))
    more = len(faults) - 1
    if not more:
        return first
    return BadInput(f"{first.what} (and {more} more)", where=first.where, fix=first.fix)


def _data_path(data: object, location: KeyPath, *, missing: bool) -> KeyPath:
    """The part of pydantic's location that exists in the data; it also names union members."""
    path: list[str | int] = []
    for index, part in enumerate(location):
        if isinstance(data, Mapping) and part in data:
            data = data[part]
        elif isinstance(data, Sequence) and not isinstance(data, str) and isinstance(part, int):
            data = data[part] if part < len(data) else None
        elif not (missing and index == len(location) - 1):
            continue
        path.append(part)
    return tuple(path)


def _fault(model: type[BaseModel], detail: ErrorDetails, path: KeyPath) -> tuple[str, str, KeyPath]:
    """What is wrong, what would be right, and where below ``path`` it is."""
    key = dotted(path) or "the document"
    context = detail.get("ctx", {})
    cause = context.get("error")
    if isinstance(cause, InvalidValue):
        return _named(cause, path), cause.fix, cause.at
    if detail["type"] == "missing":
        return f"{key} is missing", "add it", ()
    if detail["type"] in _UNKNOWN:
        return f"{key} is an unknown key", nearest(str(path[-1]), _keys(model, path[:-1])), ()
    what = f"{key} is {shown(detail['input'])}"
    if isinstance(cause, ValueError):
        return what, str(cause), ()
    if detail["type"] in ("model_type", "model_attributes_type", "dict_type", "dataclass_type"):
        return what, "give a mapping of keys to values", ()
    remedy = re.sub(r"^\w+ should", "it should", detail["msg"])
    return what, remedy.replace(" after validation", ""), ()


def _named(error: InvalidValue, path: KeyPath) -> str:
    """What is wrong, with the whole key before it."""
    key, own = dotted(path + error.at), dotted(error.at)
    if own and error.what.startswith(own):
        return key + error.what.removeprefix(own)
    return f"{key}: {error.what}" if key else error.what


def _keys(model: type, path: KeyPath) -> set[str]:
    """The keys that the model allows at a path."""
    models: list[type] = [model]
    for part in path:
        if isinstance(part, str):
            inner = [_models(_annotations(outer).get(part)) for outer in models]
            models = [found for group in inner for found in group] or models
    return {key for found in models for key in _annotations(found)}


def _annotations(model: type) -> dict[str, object]:
    """The annotation of each key of a model or dataclass, as users write the key."""
    if issubclass(model, BaseModel):
        fields = model.model_fields.items()
        return {field.alias or name: field.annotation for name, field in fields}
    return get_type_hints(model)


def _models(annotation: object) -> list[type]:
    if isinstance(annotation, type) and (
        issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)
    ):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Writes a whole file or nothing: readers see the old content or the new, never a part.

    Raises:
        BadInput: the folder is missing or may not be written, or the disk is full; the old file
            stays as it was.
    """
    target = Path(path).resolve()
    payload = content.encode() if isinstance(content, str) else content
    temporary: str | None = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=".trimtab-")
        with os.fdopen(descriptor, "wb") as file:
            file.write(payload)
            file.flush()
            os.fchmod(file.fileno(), _mode(target))
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise _unwritable(path, target, error) from None
    else:
        temporary = None
    finally:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)


def _mode(target: Path) -> int:
    with suppress(OSError):
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _unwritable(path: str | Path, target: Path, error: OSError) -> BadInput:
    where = str(path)
    if target.is_dir():
        return BadInput("this is a folder", where=where, fix="give the name of a file")
    if not target.parent.is_dir():
        return BadInput(f"there is no folder {target.parent}", where=where, fix="make it first")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BadInput("the disk is full", where=where, fix="free some space")
    if isinstance(error, PermissionError):
        return BadInput("the folder may not be written", where=where, fix="check its permissions")
    return BadInput(f"the file cannot be written ({error.strerror or error})", where=where)


def digest(source: object) -> str:
    """The SHA-256, in hex, of a file (given as a `Path`) or of a document's canonical JSON.

    Args:
        source: a `Path`; else anything pydantic can serialise (models, dataclasses, plain data).

    Raises:
        BadInput: the file cannot be read.
    """
    if isinstance(source, Path):
        try:
            with source.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise unreadable(source, error) from None
    plain = TypeAdapter(Any).dump_python(source, mode="json")
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
