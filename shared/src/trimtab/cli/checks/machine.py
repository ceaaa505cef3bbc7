"""Python and the disk."""

from __future__ import annotations

import os
import shutil
import sys

from trimtab.cli.checks.finding import Finding, error, ok, warning
from trimtab.core.cache import cache_directory

OLDEST_PYTHON = (3, 11)
LEAST_FREE_BYTES = 2 * 2**30
"""Room for the small model while it is converted, and for compiled kernels."""


def python(version: tuple[int, ...] = sys.version_info[:3]) -> list[Finding]:
    """Whether this Python is one that trimtab runs on."""
    shown = ".".join(map(str, version))
    if version[:2] < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return [
            error("python", f"Python {shown} is older than {oldest}", f"install Python {oldest}")
        ]
    return [ok("python", f"Python {shown} at {sys.executable}")]


def cache_room(least_free_bytes: int = LEAST_FREE_BYTES) -> list[Finding]:
    """Whether trimtab's cache can be written and has room."""
    folder = cache_directory()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    elsewhere = "set TRIMTAB_CACHE to a folder elsewhere"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return [error("cache", f"the cache {folder} cannot be written", elsewhere)]
    free_bytes = shutil.disk_usage(there).free
    room = f"the cache {folder} has {free_bytes / 2**30:.1f} GiB free"
    if free_bytes < least_free_bytes:
        needed = f"{least_free_bytes / 2**30:.1f} GiB"
        return [warning("cache", f"{room}, less than {needed}", f"free some, or {elsewhere}")]
    return [ok("cache", room)]
