"""Parameters that ZeRO-3 spreads over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


@contextmanager
def whole(parameters: Iterable[Any]) -> Iterator[None]:
    """Has parameters in full for a while, to read them; every rank must come here.

    A model built under ``deepspeed.zero.Init`` holds empty ones; nothing is done for others.
    """
    spread = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not spread:
        yield
        return
    with import_module("deepspeed.runtime.zero").GatheredParameters(spread):
        yield
