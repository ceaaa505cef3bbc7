"""Traces of cluster jobs: trimtab's own files, and the formats of public ones."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from trimtab.core.documents import (
    parse_json,
    read_lines,
    read_text,
    shown,
    validate,
    write_atomic,
)
from trimtab.core.errors import BadInput
from trimtab.core.simulate.cluster_jobs import ClusterJob, JobRequest, fault

Format = Literal["trimtab", "csv", "philly", "helios", "slurm"]
FORMATS: tuple[Format, ...] = ("trimtab", "csv", "philly", "helios", "slurm")
MAX_JSON_BYTES = 2**30

Placed = Iterator[tuple[str, ClusterJob]]
"""Jobs with the place that each comes from, such as ``trace.csv:17``."""
Row = Mapping[str, str]


def read_jobs(
    path: str | Path,
    *,
    trace_format: Format | None = None,
    gpus_per_node: int = 8,
    limit: int | None = None,
) -> list[ClusterJob]:
    """Reads a trace of jobs, by arrival; the first arrives at 0 unless the trace is trimtab's own.

    Args:
        path: the file.
        trace_format: what it is; by default its first line tells.

            - ``trimtab``: JSON lines with the fields of `JobRequest` and ``duration_s``.
            - ``csv``: the same as columns.
            - ``philly``: the JSON array of Microsoft's Philly traces (``jobid``, ``vc``,
              ``submitted_time``, ``attempts``); a job holds as many nodes as its first attempt
              names, from the first attempt's start to the last one's end.
            - ``helios``: SenseTime's Helios CSV (``job_id``, ``gpu_num``, ``node_num``,
              ``submit_time``, ``duration``, ``vc``); jobs without GPUs are left out.
            - ``slurm``: ``sacct --parsable2`` with at least JobID, Submit, Start, End and NNodes;
              Timelimit, Account and Priority are used where they are; steps are left out.
        gpus_per_node: for rows that count GPUs only.
        limit: how many jobs to read at most.

    Raises:
        BadInput: it names the file, the line, the key and what would be right.
    """
    chosen, placed = _placed(path, trace_format, gpus_per_node)
    jobs: list[ClusterJob] = []
    seen: set[str] = set()
    for where, job in placed:
        found = fault(job)
        if found is not None:
            raise BadInput(found.what, where=where, fix=found.fix)
        if job.request.job_id in seen:
            raise BadInput(
                f"the job {job.request.job_id!r} is given twice",
                where=where,
                fix="give each job an id of its own",
            )
        seen.add(job.request.job_id)
        jobs.append(job)
        if limit is not None and len(jobs) >= limit:
            break
    if not jobs:
        raise BadInput("there is no job that ran", where=str(path), fix="give a trace with jobs")
    jobs.sort(key=lambda job: job.request.arrival_s)
    return jobs if chosen in ("trimtab", "csv") else _from_zero(jobs)


def write_jobs(path: str | Path, jobs: Iterable[ClusterJob]) -> None:
    """Writes a trace as JSON lines, whole or not at all."""
    lines = [json.dumps(asdict(job.request) | {"duration_s": job.duration_s}) for job in jobs]
    write_atomic(path, "\n".join(lines) + "\n")


def _from_zero(jobs: list[ClusterJob]) -> list[ClusterJob]:
    first_s = jobs[0].request.arrival_s
    return [
        replace(job, request=replace(job.request, arrival_s=job.request.arrival_s - first_s))
        for job in jobs
    ]


def _placed(
    path: str | Path, trace_format: Format | None, gpus_per_node: int
) -> tuple[Format, Placed]:
    lines = read_lines(path)
    first = next(lines, None)
    if first is None:
        raise BadInput("the file is empty", where=str(path))
    chosen = trace_format or _detected(first[1], f"{path}:{first[0]}")
    if chosen == "philly":
        return chosen, _philly(path, gpus_per_node)
    everything = chain([first], lines)
    if chosen == "trimtab":
        return chosen, _own(everything, str(path))
    convert: Mapping[Format, Callable[[Row, str], ClusterJob | None]] = {
        "csv": _own_row,
        "helios": lambda row, where: _helios(row, where, gpus_per_node),
        "slurm": _slurm,
    }
    if chosen not in convert:
        raise BadInput(f"there is no format {chosen!r}", fix=f"known are {', '.join(FORMATS)}")
    return chosen, _rows(everything, str(path), convert[chosen])


def _detected(line: str, where: str) -> Format:
    """The format that a file's first line is in."""
    start = line.lstrip()
    if start.startswith("["):
        return "philly"
    if start.startswith("{"):
        return "trimtab"
    if "|" in line and "JobID" in line:
        return "slurm"
    columns = line.split(",")
    if "job_id" in columns:
        return "helios" if "submit_time" in columns else "csv"
    raise BadInput(
        f"{shown(line)} begins no known format", where=where, fix=f"known are {', '.join(FORMATS)}"
    )


def _own(lines: Iterable[tuple[int, str]], path: str) -> Placed:
    for number, line in lines:
        where = f"{path}:{number}"
        record = parse_json(line, where=where)
        if not isinstance(record, dict):
            raise BadInput(f"{shown(record)} is no job", where=where, fix="give a JSON object")
        yield where, _own_job(record, where)


def _own_job(record: Mapping[str, Any], where: str) -> ClusterJob:
    """A job from trimtab's own keys, in which request and duration lie side by side."""
    if "duration_s" not in record:
        raise BadInput("duration_s is missing", where=where, fix="add it")
    request = {key: value for key, value in record.items() if key != "duration_s"}
    return validate(
        ClusterJob,
        {
            "request": validate(JobRequest, request, where=where),
            "duration_s": record["duration_s"],
        },
        where=where,
    )


def _own_row(row: Row, where: str) -> ClusterJob:
    return _own_job({key: value for key, value in row.items() if value != ""}, where)


def _rows(
    lines: Iterable[tuple[int, str]],
    path: str,
    convert: Callable[[Row, str], ClusterJob | None],
) -> Placed:
    numbered = iter(lines)
    number, header = next(numbered)
    delimiter = "|" if "|" in header else ","
    names = next(csv.reader([header], delimiter=delimiter))
    for number, line in numbered:
        where = f"{path}:{number}"
        cells = next(csv.reader([line], delimiter=delimiter))
        if len(cells) != len(names):
            raise BadInput(
                f"the line has {len(cells)} of {len(names)} columns",
                where=where,
                fix="the file seems cut: give it whole",
            )
        job = convert(dict(zip(names, cells, strict=True)), where)
        if job is not None:
            yield where, job


def _helios(row: Row, where: str, gpus_per_node: int) -> ClusterJob | None:
    gpus = _number(row, "gpu_num", where)
    duration_s = _number(row, "duration", where)
    if gpus < 1 or duration_s == 0:
        return None
    nodes = _number(row, "node_num", where) if row.get("node_num") else gpus / gpus_per_node
    request = JobRequest(
        job_id=_text(row, "job_id", where),
        arrival_s=_time_s(row, "submit_time", where),
        nodes=max(1, math.ceil(nodes)),
        department=row.get("vc", ""),
    )
    return ClusterJob(request, duration_s)


def _slurm(row: Row, where: str) -> ClusterJob | None:
    job_id = _text(row, "JobID", where)
    if "." in job_id or row.get("Start") in ("Unknown", "None", "") or row.get("End") == "Unknown":
        return None
    duration_s = _time_s(row, "End", where) - _time_s(row, "Start", where)
    if duration_s == 0:
        return None
    request = JobRequest(
        job_id=job_id,
        arrival_s=_time_s(row, "Submit", where),
        nodes=int(_number(row, "NNodes", where)),
        limit_s=_slurm_limit_s(row.get("Timelimit", ""), where),
        department=row.get("Account", ""),
    )
    return ClusterJob(request, duration_s)


_LIMIT = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


def _slurm_limit_s(text: str, where: str) -> float | None:
    """Seconds of ``[DAYS-]HOURS:MINUTES:SECONDS``."""
    if text in ("", "UNLIMITED", "Partition_Limit"):
        return None
    match = _LIMIT.fullmatch(text)
    if match is None:
        raise BadInput(f"Timelimit is {shown(text)}", where=where, fix="write 1-02:00:00")
    days, first, second, third = (int(part or 0) for part in match.groups())
    if match[4] is not None or match[1] is not None:
        return days * 86400.0 + first * 3600 + second * 60 + third
    return first * 60.0 + second


def _philly(path: str | Path, gpus_per_node: int) -> Placed:
    data = parse_json(read_text(path, max_bytes=MAX_JSON_BYTES), where=str(path))
    if not isinstance(data, list):
        raise BadInput("this is no list of jobs", where=str(path), fix="give a JSON array")
    for index, record in enumerate(data):
        where = f"{path}, job {index}"
        job = _philly_job(record, where, gpus_per_node)
        if job is not None:
            yield where, job


def _philly_job(record: Any, where: str, gpus_per_node: int) -> ClusterJob | None:
    try:
        attempts = record["attempts"]
        if not attempts or not attempts[0].get("start_time") or not attempts[-1].get("end_time"):
            return None
        start_s = _seconds(attempts[0]["start_time"], "start_time", where)
        end_s = _seconds(attempts[-1]["end_time"], "end_time", where)
        detail = attempts[0]["detail"]
        gpus = sum(len(part["gpus"]) for part in detail)
        request = JobRequest(
            job_id=str(record["jobid"]),
            arrival_s=_seconds(record["submitted_time"], "submitted_time", where),
            nodes=max(1, math.ceil(gpus / gpus_per_node), len(detail)),
            department=str(record.get("vc", "")),
        )
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise BadInput(
            f"the record lacks {error}" if isinstance(error, KeyError) else "this is no job",
            where=where,
            fix="give jobid, vc, submitted_time and attempts",
        ) from None
    return ClusterJob(request, end_s - start_s) if end_s != start_s else None


def _text(row: Row, column: str, where: str) -> str:
    if not row.get(column):
        raise BadInput(f"{column} is missing", where=where, fix="add the column")
    return row[column]


def _number(row: Row, column: str, where: str) -> float:
    text = _text(row, column, where)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise BadInput(f"{column} is {shown(text)}", where=where, fix="give a finite number")
    return number


def _time_s(row: Row, column: str, where: str) -> float:
    return _seconds(_text(row, column, where), column, where)


def _seconds(text: object, column: str, where: str) -> float:
    """Seconds of a date without regard to its zone: only differences matter."""
    try:
        return datetime.fromisoformat(str(text).strip()).replace(tzinfo=UTC).timestamp()
    except (ValueError, OverflowError):
        raise BadInput(
            f"{column} is {shown(text)}", where=where, fix="write 2017-10-09 07:01:55"
        ) from None
