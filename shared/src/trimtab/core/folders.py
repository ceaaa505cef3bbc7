"""Folders of files that belong together: all of them are there, or none."""

from __future__ import annotations

import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from trimtab.core.errors import BadInput

_STOPS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


def write_folder(folder: str | Path, files: Mapping[str, str]) -> None:
    """Writes files into a folder, whether it is there or not; those with ``#!`` can be run.

    They are written aside and moved when all are whole, and a signal to stop waits for that. What
    else is in the folder stays.

    Args:
        folder: where they go; the folders above it are made too.
        files: the content of each by its name.

    Raises:
        BadInput: the folder cannot be made or written; it is then as it was.
    """
    target = Path(folder).resolve()
    with _unstopped():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            is_new = not target.exists()
            beside = target.parent if is_new else target
            with tempfile.TemporaryDirectory(prefix=".trimtab-", dir=beside) as aside:
                made = Path(aside) / "made"
                made.mkdir()
                _fill(made, files)
                if is_new:
                    made.rename(target)
                else:
                    _move(made, target, list(files))
        except OSError as error:
            raise BadInput(
                f"the folder cannot be written ({error.strerror or error})", where=str(folder)
            ) from None


def _fill(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.write_text(text, encoding="utf-8")
        if text.startswith("#!"):
            path.chmod(0o755)


def _move(made: Path, folder: Path, names: Sequence[str]) -> None:
    for name in names:
        if (folder / name).is_dir():
            raise BadInput("this is a folder", where=str(folder / name), fix="name another folder")
    for name in names:
        (made / name).replace(folder / name)


@contextmanager
def _unstopped() -> Iterator[None]:
    """Holds back signals that would stop this process until the block has ended.

    They reach Python's main thread alone, whichever thread of the process gets them: to block them
    in one thread would not do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {stop: signal.signal(stop, lambda number, _: came.append(number)) for stop in _STOPS}
    try:
        yield
    finally:
        for stop, handler in before.items():
            # None stands for a handler that is not Python's, which cannot be put back.
            signal.signal(stop, signal.SIG_DFL if handler is None else handler)
    for number in came[:1]:
        signal.raise_signal(number)
