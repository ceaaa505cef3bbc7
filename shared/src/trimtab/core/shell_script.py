"""Scripts for bash."""

from __future__ import annotations

from collections.abc import Sequence


def shell_script(lines: Sequence[str], *, strict: bool = True) -> str:
    """A script of these lines, which ends at the first that fails if it is ``strict``."""
    head = ["#!/usr/bin/env bash", *(["set -euo pipefail"] if strict else [])]
    return "\n".join([*head, *lines]) + "\n"
