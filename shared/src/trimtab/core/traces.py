"""Workloads from files: trimtab's own JSON lines and the formats that public traces come in."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, NonNegativeFloat, NonNegativeInt

from trimtab.core.documents import parse_json, read_lines, read_text, shown, unreadable, validate
from trimtab.core.errors import BadInput
from trimtab.core.workload import Request, Workload, fault

Format = Literal["trimtab", "azure", "mooncake", "sharegpt"]
FORMATS: tuple[Format, ...] = ("trimtab", "azure", "mooncake", "sharegpt")

# A hash id of the Mooncake traces stands for this many tokens (arXiv:2407.00079).
MOONCAKE_BLOCK_TOKENS = 512
MAX_ARRAY_BYTES = 2**30

Lines = Iterator[tuple[int, str]]
Placed = Iterator[tuple[str, Request]]
"""Requests with the place that each comes from, such as ``trace.csv:17``."""

_ANSWERERS = frozenset({"gpt", "assistant", "chatgpt", "bing", "bard"})


def read_workload(
    path: str | Path,
    *,
    trace_format: Format | None = None,
    count_tokens: Callable[[str], int] | None = None,
    limit: int | None = None,
) -> Workload:
    """Reads a workload; JSON lines and CSV are read line by line.

    Args:
        path: the file.
        trace_format: what it is; by default its first line tells.

            - ``trimtab``: JSON lines with the fields of `Request`.
            - ``azure``: the CSV of the Azure LLM inference traces
              (``TIMESTAMP,ContextTokens,GeneratedTokens``).
            - ``mooncake``: JSON lines with ``timestamp`` (ms), ``input_length``,
              ``output_length`` and ``hash_ids``; the prefix of a request is the run of blocks
              that saves most when cached.
            - ``sharegpt``: conversations, as JSON lines or one JSON array; each answer is a
              request that depends on the one before it. They all arrive at 0.
        count_tokens: counts the tokens of a text (``sharegpt`` only); 4 characters each by default.
        limit: how many requests to read at most.

    Raises:
        BadInput: it names the file, the line, the key and what would be right.
    """
    if _begins_array(path):
        placed = _sharegpt_array(path, trace_format, count_tokens)
    else:
        placed = _line_by_line(path, trace_format, count_tokens)
    return _workload(list(islice(placed, limit)), path)


def _begins_array(path: str | Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    except OSError as error:
        raise unreadable(path, error) from None


def _line_by_line(
    path: str | Path, trace_format: Format | None, count_tokens: Callable[[str], int] | None
) -> Placed:
    lines = read_lines(path)
    first = next(lines, None)
    if first is None:
        raise BadInput("the file is empty", where=str(path))
    chosen = trace_format or _detected(first[1], f"{path}:{first[0]}")
    return _reader(chosen, count_tokens)(chain([first], lines), str(path))


def _workload(placed: Sequence[tuple[str, Request]], path: str | Path) -> Workload:
    requests = tuple(request for _, request in placed)
    found = fault(requests)
    if found is not None:
        raise BadInput(found.what, where=placed[found.index][0], fix=found.fix)
    return Workload(requests, Path(path).stem)


def _detected(line: str, where: str) -> Format:
    """The format that a file's first line is in."""
    if line.lstrip().startswith("{"):
        record = parse_json(line, where=where)
        marks: Mapping[str, Format] = {
            "request_id": "trimtab",
            "input_length": "mooncake",
            "conversations": "sharegpt",
        }
        for key, trace_format in marks.items():
            if key in record:
                return trace_format
    elif "ContextTokens" in line:
        return "azure"
    raise BadInput(
        f"{shown(line)} begins no known format", where=where, fix=f"known are {', '.join(FORMATS)}"
    )


def _reader(
    trace_format: Format, count_tokens: Callable[[str], int] | None
) -> Callable[[Lines, str], Placed]:
    def sharegpt(lines: Lines, path: str) -> Placed:
        return _sharegpt(_records(lines, path), count_tokens)

    readers: Mapping[str, Callable[[Lines, str], Placed]] = {
        "trimtab": _trimtab,
        "azure": _azure,
        "mooncake": _mooncake,
        "sharegpt": sharegpt,
    }
    if trace_format not in readers:
        raise BadInput(
            f"there is no format {trace_format!r}", fix=f"known are {', '.join(FORMATS)}"
        )
    return readers[trace_format]


def _records(lines: Lines, path: str) -> Iterator[tuple[str, Any]]:
    for number, line in lines:
        where = f"{path}:{number}"
        yield where, parse_json(line, where=where)


def _trimtab(lines: Lines, path: str) -> Placed:
    for where, record in _records(lines, path):
        yield where, validate(Request, record, where=where)


def _azure(lines: Lines, path: str) -> Placed:
    number, header = next(lines)
    names = next(csv.reader([header]))
    columns = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    missing = [column for column in columns if column not in names]
    if missing:
        raise BadInput(
            f"the header lacks {', '.join(missing)}",
            where=f"{path}:{number}",
            fix=f"give {','.join(columns)}",
        )
    start: datetime | None = None
    for number, line in lines:
        where = f"{path}:{number}"
        cells = next(csv.reader([line]))
        if len(cells) != len(names):
            raise BadInput(
                f"the line has {len(cells)} of {len(names)} columns",
                where=where,
                fix="the file seems cut: give it whole",
            )
        row = dict(zip(names, cells, strict=True))
        time = _timestamp(row["TIMESTAMP"], where)
        start = start or time
        yield (
            where,
            Request(
                request_id=f"r{number}",
                arrival_s=_seconds_between(start, time, where),
                prompt_tokens=_count(row, "ContextTokens", where),
                output_tokens=_count(row, "GeneratedTokens", where),
            ),
        )


def _timestamp(text: str, where: str) -> datetime:
    try:
        return datetime.fromisoformat(text.strip())
    except ValueError:
        raise BadInput(
            f"TIMESTAMP is {shown(text)}", where=where, fix="write 2023-11-16 18:15:46.680590"
        ) from None


def _seconds_between(start: datetime, time: datetime, where: str) -> float:
    try:
        return (time - start).total_seconds()
    except TypeError:  # only one of them has a time zone
        raise BadInput(
            "TIMESTAMP has a time zone in some lines only", where=where, fix="give it in all"
        ) from None


def _count(row: Mapping[str, str], column: str, where: str) -> int:
    text = row[column].strip()
    if not text.isdecimal() or len(text) > 12:
        raise BadInput(f"{column} is {shown(text)}", where=where, fix="give a whole number")
    return int(text)


class _MooncakeRecord(BaseModel):
    timestamp: NonNegativeFloat
    input_length: NonNegativeInt
    output_length: NonNegativeInt
    hash_ids: list[int] = Field(default_factory=list)


def _mooncake(lines: Lines, path: str) -> Placed:
    records = [
        (where, validate(_MooncakeRecord, record, where=where))
        for where, record in _records(lines, path)
    ]
    uses = Counter(block for _, record in records for block in record.hash_ids)
    for index, (where, record) in enumerate(records):
        depth = _best_prefix(record.hash_ids, uses)
        yield (
            where,
            Request(
                request_id=f"r{index}",
                arrival_s=record.timestamp / 1000,
                prompt_tokens=record.input_length,
                output_tokens=record.output_length,
                prefix=f"block-{record.hash_ids[depth - 1]}" if depth else None,
                prefix_tokens=min(depth * MOONCAKE_BLOCK_TOKENS, record.input_length),
            ),
        )


def _best_prefix(blocks: Sequence[int], uses: Mapping[int, int]) -> int:
    """How many leading blocks to take as the shared prefix: those that save most in all."""
    saved = [(uses[block] - 1) * depth for depth, block in enumerate(blocks, 1)]
    most = max(saved, default=0)
    return saved.index(most) + 1 if most > 0 else 0


class _Turn(BaseModel):
    speaker: str = Field(alias="from")
    value: str


class _Conversation(BaseModel):
    id: str | int | None = None
    conversations: list[_Turn]


def _sharegpt_array(
    path: str | Path, trace_format: Format | None, count_tokens: Callable[[str], int] | None
) -> Placed:
    if trace_format not in (None, "sharegpt"):
        raise BadInput(
            f"a JSON array is no {trace_format} file", where=str(path), fix="give JSON lines"
        )
    records = parse_json(read_text(path, max_bytes=MAX_ARRAY_BYTES), where=str(path))
    placed = ((f"{path}, item {index}", record) for index, record in enumerate(records))
    return _sharegpt(placed, count_tokens)


def _sharegpt(
    records: Iterable[tuple[str, Any]], count_tokens: Callable[[str], int] | None
) -> Placed:
    count = count_tokens or _four_characters
    for number, (where, record) in enumerate(records, 1):
        conversation = validate(_Conversation, record, where=where)
        workflow = f"c{number}"
        prompt_tokens = 0
        before: tuple[str, ...] = ()
        for index, turn in enumerate(conversation.conversations):
            tokens = max(1, count(turn.value))
            if turn.speaker in _ANSWERERS and prompt_tokens:
                request_id = f"{workflow}-{index}"
                yield (
                    where,
                    Request(
                        request_id=request_id,
                        arrival_s=0.0,
                        prompt_tokens=prompt_tokens,
                        output_tokens=tokens,
                        workflow=workflow,
                        stage=f"turn-{index}",
                        depends_on=before,
                    ),
                )
                before = (request_id,)
            prompt_tokens += tokens


def _four_characters(text: str) -> int:
    return len(text) // 4
