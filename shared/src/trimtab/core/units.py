"""Quantities as people write them (``100 Gb/s``, ``25 GB/s``, ``80 GiB``, ``5 us``), in SI units.

A small ``b`` is a bit and a large ``B`` a byte; ``k M G T P`` are powers of 1000 and
``Ki Mi Gi Ti`` powers of 1024. A bare number is in the unit that the key's name says.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated

from pydantic import BeforeValidator

from trimtab.core.documents import InvalidValue, shown

_NUMBER = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
_PREFIX = r"([kKMGTP]?i?)"
_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50}
_SCALE = _DECIMAL | _BINARY
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ns": 1e-9, "min": 60.0}

_BYTES = re.compile(rf"{_NUMBER}\s*{_PREFIX}B")
_RATE = re.compile(rf"{_NUMBER}\s*{_PREFIX}([bB])(?:/s|ps|it/s)")
_TIME = re.compile(rf"{_NUMBER}\s*({'|'.join(_SECONDS)})")
_FLOPS = re.compile(rf"{_NUMBER}\s*{_PREFIX}(?:FLOP/s|FLOPS|OP/s|OPS)")


def parse_bytes(value: object) -> object:
    """Bytes from text such as ``80 GiB``; anything but text with a unit passes unchanged."""
    return _parse(value, _BYTES, lambda m: _scaled(m[1], m[2]), "80 GiB, 24 GB or bytes")


def parse_bytes_per_s(value: object) -> object:
    """Bytes per second from text such as ``100 Gb/s`` (bits) or ``25 GB/s`` (bytes)."""

    def rate(match: re.Match[str]) -> float:
        return _scaled(match[1], match[2]) / (8 if match[3] == "b" else 1)

    return _parse(value, _RATE, rate, "100 Gb/s (bits), 25 GB/s (bytes) or bytes per second")


def parse_seconds(value: object) -> object:
    """Seconds from text such as ``5 us`` or ``2 ms``."""
    return _parse(value, _TIME, lambda m: float(m[1]) * _SECONDS[m[2]], "5 us, 2 ms or seconds")


def parse_flop_per_s(value: object) -> object:
    """FLOP/s from text such as ``989 TFLOPS``; dense figures, not those with sparsity."""
    return _parse(value, _FLOPS, lambda m: _scaled(m[1], m[2]), "989 TFLOPS or FLOP per second")


def _parse(
    value: object,
    pattern: re.Pattern[str],
    convert: Callable[[re.Match[str]], float],
    examples: str,
) -> object:
    if not isinstance(value, str) or re.fullmatch(_NUMBER, value.strip()):
        return value
    match = pattern.fullmatch(value.strip())
    if match is None:
        raise InvalidValue(f"{shown(value)} is no quantity", fix=f"write {examples}")
    return convert(match)


def _scaled(number: str, prefix: str) -> float:
    if prefix not in _SCALE:
        raise InvalidValue(f"{prefix!r} is no prefix of a unit", fix="write k, M, G, T or Gi")
    return float(number) * _SCALE[prefix]


Bytes = Annotated[float, BeforeValidator(parse_bytes)]
BytesPerSecond = Annotated[float, BeforeValidator(parse_bytes_per_s)]
Seconds = Annotated[float, BeforeValidator(parse_seconds)]
FlopPerSecond = Annotated[float, BeforeValidator(parse_flop_per_s)]
