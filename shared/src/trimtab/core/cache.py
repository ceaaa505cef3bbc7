"""Where trimtab keeps what it makes once."""

from __future__ import annotations

import hashlib
import os
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
        raise BadInput(
            f"the cache cannot be written ({error.strerror or error})",
            where=str(folder),
            fix="name another folder in TRIMTAB_CACHE",
        ) from None
    write_atomic(path, content)
    return path
