"""What a check says."""

from __future__ import annotations

from enum import Enum

from pydantic import BaseModel, ConfigDict


class Level(Enum):
    """How bad a finding is; only errors change the exit status."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


class Finding(BaseModel):
    """One line of ``trimtab doctor``.

    Attributes:
        check: the subject in a word or two, e.g. ``"vllm plugins"``.
        level: how bad it is.
        what: what was found, in one sentence.
        fix: what to do about it, as a command where there is one; empty when nothing is wrong.
    """

    model_config = ConfigDict(frozen=True)

    check: str
    level: Level
    what: str
    fix: str = ""


def ok(check: str, what: str) -> Finding:
    """Nothing is wrong."""
    return Finding(check=check, level=Level.OK, what=what)


def warning(check: str, what: str, fix: str) -> Finding:
    """Something works less well than it could, or may be meant."""
    return Finding(check=check, level=Level.WARNING, what=what, fix=fix)


def error(check: str, what: str, fix: str) -> Finding:
    """Something will fail."""
    return Finding(check=check, level=Level.ERROR, what=what, fix=fix)
