"""Processes that listen and say where."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from trimtab.core.errors import TrimtabError

_STARTS_WITHIN_S = 60.0
_LOOK_EVERY_S = 0.05
_ADDRESS = re.compile(r"http://[\d.]+:\d+")


@contextmanager
def listening(*arguments: str) -> Iterator[str]:
    """A Python module as a process that says its address; gone when the block ends."""
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(
            [sys.executable, "-m", *arguments], stdout=said, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            yield _address(process, said)
        finally:
            process.terminate()


def _address(process: subprocess.Popen[bytes], said: IO[bytes]) -> str:
    give_up_s = time.monotonic() + _STARTS_WITHIN_S
    while True:
        living = process.poll() is None
        # Not read(), which would move the place where the process writes.
        text = os.pread(said.fileno(), 2**16, 0).decode(errors="replace")
        found = _ADDRESS.search(text)
        if found:
            return found[0]
        if not living or time.monotonic() > give_up_s:
            raise TrimtabError(f"a process has not started: {text[-500:]}")
        time.sleep(_LOOK_EVERY_S)
