"""Saying on standard error what a long command is doing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trimtab.core.benchmark import Progress


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """A progress bar on stderr; where stderr is no terminal, one line for each new message."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _say_once()
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(message: str, done: float | None = None) -> None:
            bar.update(task, description=message, total=1.0 if done is not None else None)
            if done is not None:
                bar.update(task, completed=done)

        yield show


def _say_once() -> Progress:
    said = ""

    def show(message: str, done: float | None = None) -> None:
        nonlocal said
        if message != said:
            print(message, file=sys.stderr, flush=True)
            said = message

    return show
