"""A plan of AllReduce as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from trimtab.core.plan import Plan
from trimtab.gentree.overtaking import Reign
from trimtab.gentree.planner import PlannedSize, planned_breakpoints, planned_sizes

_KIBI = 1024


def plan_table(plan: Plan) -> Group:
    """One row for each size, and what each kind of switch does for the largest."""
    sizes = planned_sizes(plan)
    table = Table(title=f"AllReduce of {len(plan.ranks):,} ranks", title_justify="left")
    for head in ("size", "planned", "bound", "of it", "rounds", "chunks", "incast", "libraries"):
        table.add_column(head, justify="right")
    for size in sizes:
        table.add_row(*_row(size))
    lines = [Text(line) for line in _switches(sizes[-1])]
    reigns = planned_breakpoints(plan)
    return Group(table, *lines, *([_reigns(reigns)] if reigns else []))


def _reigns(reigns: Sequence[Reign]) -> Table:
    table = Table(title="The best plan by size", title_justify="left")
    table.add_column("from", justify="right")
    table.add_column("rounds", justify="right")
    table.add_column("incast", justify="right")
    table.add_column("switches, from the lowest")
    for reign in reigns:
        switches = " | ".join(dict.fromkeys(choice for _, choice in reign.switches))
        row = (shown_bytes(reign.from_bytes), str(reign.rounds), str(reign.width), switches)
        table.add_row(*row)
    return table


def _row(size: PlannedSize) -> list[str]:
    share = f"{size.bound_s / size.seconds:.0%}" if size.seconds else "–"
    return [
        shown_bytes(size.payload_bytes),
        shown_seconds(size.seconds),
        shown_seconds(size.bound_s),
        share,
        str(size.rounds),
        str(size.schedule.chunks),
        str(size.width),
        _best_of_libraries(size),
    ]


def _best_of_libraries(size: PlannedSize) -> str:
    if not size.baselines_s:
        return "–"
    name = min(size.baselines_s, key=lambda other: size.baselines_s[other])
    return f"{shown_seconds(size.baselines_s[name])} {name}"


def _switches(size: PlannedSize) -> list[str]:
    return [f"below {name}: {choice}" for name, choice in size.switches[:12]]


def shown_bytes(count: float) -> str:
    """Bytes with a binary prefix."""
    for prefix in ("", "Ki", "Mi"):
        if count < _KIBI:
            return f"{count:.4g} {prefix}B"
        count /= _KIBI
    return f"{count:.4g} GiB"


def shown_seconds(seconds: float) -> str:
    """Seconds, milliseconds or microseconds with three figures."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    if seconds >= 1e-3:
        return f"{1e3 * seconds:.3g} ms"
    return f"{1e6 * seconds:.3g} µs"
