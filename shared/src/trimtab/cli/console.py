"""Where a command writes: results on stdout, all else on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

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


def print_out(content: RenderableType) -> None:
    """Prints on stdout; as wide as the content needs where stdout is no terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=Console(width=WIDEST).measure(content).maximum)
    console.print(content)
