"""Calls a function in another Python process, where it may import, hang or crash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

_CHILD = """
import json, os, sys
from importlib import import_module
answer = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
module, _, name = sys.argv[1].partition(":")
result = getattr(import_module(module), name)(*sys.argv[2:])
answer.write(json.dumps(result))
answer.flush()
os._exit(0)
"""


class CallFailed(Exception):
    """The function raised, ended its process or took too long; the message says which."""


def call(function: str, *arguments: str, timeout_s: float = 60.0) -> Any:
    """The result of ``module:function`` called with strings in a new process.

    The process has this one's module path without the working directory, which would let any file
    there pass for a package. What it prints is dropped.

    Raises:
        CallFailed: there is no result.
    """
    command = [sys.executable, "-P", "-c", _CHILD, function, *arguments]
    modules = os.pathsep.join(entry for entry in sys.path if entry)
    try:
        ended = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=timeout_s,
            env={**os.environ, "PYTHONPATH": modules},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CallFailed(f"no answer within {timeout_s:g} s") from None
    if ended.returncode == 0 and ended.stdout:
        return json.loads(ended.stdout)
    raise CallFailed(_reason(ended.returncode, ended.stderr))


def _reason(status: int, stderr: str) -> str:
    if status < 0:
        return f"it ends its process by {signal.Signals(-status).name}"
    lines = [line for line in stderr.splitlines() if line.strip()]
    if "Traceback (most recent call last):" in lines:
        return lines[-1].strip()
    return f"it ends its process with exit status {status}"
