"""Where a command writes: results on stdout, all else on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

    from trimtab.core.benchmark import Progress

WIDEST = 400
"""Columns of the widest output into a file or pipe."""


@contextlib.contextmanager
def chatter_on_stderr() -> Iterator[None]:
    """Sends stdout to stderr, for this process and the ones it starts meanwhile.

    Frameworks print; a command that promised one JSON object on stdout runs them inside this.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 1)
        os.close(kept)


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


def print_out(content: RenderableType) -> None:
    """Prints on stdout; as wide as the content needs where stdout is no terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=Console(width=WIDEST).measure(content).maximum)
    console.print(content)
