"""Where trimtab keeps what it makes once."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from trimtab.core.documents import write_atomic
from trimtab.core.errors import BadInput


def cache_directory() -> Path:
    """``$TRIMTAB_CACHE``, else ``trimtab`` in the XDG cache."""
    own = os.environ.get("TRIMTAB_CACHE")
    if own:
        return Path(own).expanduser()
    # The XDG specification says that a relative path is to be ignored.
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "trimtab"


def keep(content: str, name: str) -> Path:
    """Writes a small file into the cache under a name made of its content, and returns its path.

    It may outlive the process: the same content is the same file, so nobody has to remove it.

    Args:
        content: the text.
        name: what the file is, the first part of its name.

    Raises:
        BadInput: the cache cannot be written.
    """
    folder = cache_directory()
    path = folder / f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable("the cache", folder, error) from None
    write_atomic(path, content)
    return path


def made_once(path: Path, what: str, make: Callable[[Path], None]) -> Path:
    """A file or folder that takes long to make: whole as soon as it is there, made on first use.

    Several processes may ask at once: one makes it, the others wait for it.

    Args:
        path: where it is kept.
        what: it is, in the words of an error.
        make: makes it at the path that it is given.

    Raises:
        BadInput: the cache cannot be written.
    """
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (path.parent / f"{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _make_aside(path, make)
    except OSError as error:
        raise _unwritable(what, path.parent, error) from error
    return path


def _make_aside(path: Path, make: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory(prefix=f"{path.name}.", dir=path.parent) as folder:
        making = Path(folder) / path.name
        make(making)
        making.rename(path)


def _unwritable(what: str, folder: Path, error: OSError) -> BadInput:
    return BadInput(
        f"{what} cannot be written ({error.strerror or error})",
        where=str(folder),
        fix="make room there, or name another folder in TRIMTAB_CACHE",
    )
