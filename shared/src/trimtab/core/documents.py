"""Documents from and to the user: bounded reading, validation with file and line, atomic writing.

Every failure is one `BadInput` sentence that names the file, the line, the key, the value and what
would be right.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import sys
import tempfile
from collections.abc import Container, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from trimtab.core.errors import BadInput
from trimtab.core.validation import Document, InvalidValue, validate
from trimtab.core.wording import KeyPath, LineMap, dotted, nearest, place, shown
from trimtab.core.yaml_reader import MAX_DEPTH, MAX_NODES, parse_yaml

__all__ = [
    "MAX_DEPTH",
    "MAX_FILE_BYTES",
    "MAX_LINE_BYTES",
    "MAX_NODES",
    "Document",
    "InvalidValue",
    "KeyPath",
    "LineMap",
    "digest",
    "dotted",
    "json_lines",
    "nearest",
    "parse_json",
    "parse_yaml",
    "place",
    "read_json",
    "read_lines",
    "read_text",
    "read_yaml",
    "shown",
    "unreadable",
    "validate",
    "write_atomic",
]

MAX_FILE_BYTES = 16 * 2**20
MAX_LINE_BYTES = 2**20

M = TypeVar("M")


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
    return validate(model, data, where=str(path), lines=lambda: json_lines(text))


def read_text(
    path: str | Path, *, max_bytes: int = MAX_FILE_BYTES, smaller: str = "give a smaller one"
) -> str:
    """Reads a UTF-8 file of at most ``max_bytes`` bytes that is not empty.

    Args:
        path: the file.
        max_bytes: of the file.
        smaller: what would be right instead of a larger one.

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
            fix=smaller,
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
    if not text or text.isspace():
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


def parse_json(text: str, *, where: str, finite: bool = True, without: Container[str] = ()) -> Any:
    """Plain data from JSON text; a repeated key is refused, and NaN and infinity if ``finite``.

    The line of a fault is given when the text has several.

    Args:
        text: the JSON.
        where: the place it comes from, for the message.
        finite: whether NaN and infinity are refused.
        without: keys that are left out wherever they stand, to save memory.

    Raises:
        BadInput: the text is no JSON.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(items)
        if len(mapping) < len(items):
            keys = [key for key, _ in items]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise BadInput(f"the key {twice!r} is given twice", where=where, fix="give it once")
        for key in [key for key in mapping if key in without]:
            del mapping[key]
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


def json_lines(text: str) -> LineMap | None:
    """The lines of JSON text's keys; JSON is YAML but for rare cases, which go without lines."""
    with suppress(BadInput):
        return parse_yaml(text, where="")[1]
    return None


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Writes a whole file or nothing: readers see the old content or the new, never a part.

    Links are followed. What is there and is no regular file, such as a pipe or ``/dev/null``, takes
    the content as it comes; so does the file that this process's output goes to.

    Raises:
        BadInput: the folder is missing or may not be written, the disk is full, or the target is a
            folder or a disk; an old file stays as it was.
    """
    payload = content.encode() if isinstance(content, str) else content
    try:
        sink = _sink(path)
        if sink is None:
            _replace(path, payload)
        else:
            with os.fdopen(sink, "wb") as file:
                file.write(payload)
    except OSError as error:
        raise _unwritable(path, error) from None


def _sink(path: str | Path) -> int | None:
    """A descriptor to write into, of what must not be replaced; None for a regular or new file."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    # A path such as /dev/stdout may lead to a file, which the rest of the output goes to as well.
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        if stream is not None and _is_behind(number, found):
            stream.flush()
            return os.dup(number)
    if stat.S_ISREG(found.st_mode):
        return None
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError
    if stat.S_ISBLK(found.st_mode):
        raise BadInput("this is a disk", where=str(path), fix="give the name of a file")
    return os.open(path, os.O_WRONLY | os.O_NOCTTY)


def _is_behind(descriptor: int, found: os.stat_result) -> bool:
    with suppress(OSError):  # the caller closed it
        return os.path.samestat(found, os.fstat(descriptor))
    return False


def _replace(path: str | Path, payload: bytes) -> None:
    target = os.path.realpath(path)
    descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(target), prefix=".trimtab-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(payload)
            file.flush()
            os.fchmod(file.fileno(), _mode(target))
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _mode(target: str) -> int:
    with suppress(OSError):
        return os.stat(target).st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _unwritable(path: str | Path, error: OSError) -> BadInput:
    where, folder = str(path), os.path.dirname(os.path.realpath(path))
    if os.path.isdir(path):
        return BadInput("this is a folder", where=where, fix="give the name of a file")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BadInput("the disk is full", where=where, fix="free some space")
    if isinstance(error, PermissionError):
        replaced = os.path.isfile(path) or not os.path.exists(path)
        what = f"the {'folder' if replaced else 'file'} may not be written"
        return BadInput(what, where=where, fix="check its permissions")
    if not os.path.isdir(folder):
        return BadInput(f"there is no folder {folder}", where=where, fix="make it first")
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
