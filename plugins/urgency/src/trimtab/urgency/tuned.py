"""A file of tuned options, taken over while the engine runs."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from trimtab.core.documents import parse_yaml, read_text, validate, write_atomic
from trimtab.core.errors import BadInput
from trimtab.urgency.config import TunedOptions

logger = logging.getLogger(__name__)

_PERIOD_S = 1.0
_MAX_BYTES = 16_384


def read(path: Path) -> TunedOptions:
    """The options of a file.

    Raises:
        BadInput: it cannot be read, is too large, is no YAML, or does not fit.
    """
    data, lines = parse_yaml(read_text(path, max_bytes=_MAX_BYTES), where=str(path))
    return validate(TunedOptions, data, where=str(path), lines=lines)


def write(path: Path, options: TunedOptions, comment: str = "") -> None:
    """Writes a file that `read` takes, whole or not at all.

    Raises:
        BadInput: it cannot be written.
    """
    comments = "".join(f"# {line}\n" for line in comment.splitlines())
    write_atomic(path, comments + options.model_dump_json(indent=2, exclude_none=True) + "\n")


class TunedFile:
    """Looks at a file once a second at most, and reads it when it has changed.

    A file that is missing or broken is logged once and changes nothing.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.due_s = -math.inf
        """When to look again."""
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._complained = False

    def changed(self, now_s: float) -> TunedOptions | None:
        """What the file says, if it has changed since the last look."""
        self.due_s = now_s + _PERIOD_S
        try:
            state = self._path.stat()
            seen = (state.st_mtime_ns, state.st_size, state.st_ino)
            if seen == self._seen:
                return None
            self._seen = seen
            options = read(self._path)
        except (BadInput, OSError) as error:
            self._complain(error)
            return None
        self._complained = False
        logger.info("tuned options taken from %s", self._path)
        return options

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            logger.warning("the tuned options stay as they are: %s", error)
        self._complained = True
