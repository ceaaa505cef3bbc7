"""What a node may be called, so that every tool that a plan is emitted for takes the name."""

from __future__ import annotations

import re

MAX_NODE_NAME = 253
"""Characters of the longest name that DNS and Kubernetes take."""

NODE_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Kubernetes takes DNS names; Slurm's lists split names at commas and brackets, DeepSpeed's host
lists at ``@``, ``:`` and ``,``."""

NODE_NAME_RULE = (
    f"use at most {MAX_NODE_NAME} ASCII letters, digits, dots, hyphens and underscores,"
    " a letter or digit first"
)
"""What would be right instead of a name that is none."""

_NAME = re.compile(NODE_NAME_PATTERN.strip("^$"))


def is_node_name(name: str) -> bool:
    """Whether a node may be called so."""
    return len(name) <= MAX_NODE_NAME and _NAME.fullmatch(name) is not None
