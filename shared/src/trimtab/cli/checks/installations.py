"""The distributions that are installed, several of one name included."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions


@dataclass(frozen=True, slots=True)
class Installation:
    """A distribution in a folder of the module path."""

    name: str
    version: str
    folder: str

    def __str__(self) -> str:
        return f"{self.name} {self.version} in {self.folder}"


def installations(found: Iterable[Distribution]) -> list[Installation]:
    """Each installation once, in the order of the module path.

    An ``.egg-info`` beside the sources of an editable installation is no second one, and neither
    is a folder that the module path names twice.
    """
    distributions = list(found)
    wheels = {_key(d) for d in distributions if d.read_text("METADATA") is not None}
    seen: dict[Installation, None] = {}
    for d in distributions:
        if d.read_text("METADATA") is not None or _key(d) not in wheels:
            seen[Installation(_key(d), d.version, str(d.locate_file("")))] = None
    return list(seen)


def installed(prefix: str) -> list[Installation]:
    """The installations whose name is ``prefix`` or starts with ``prefix-``."""
    return installations(
        d for d in distributions() if _key(d) == prefix or _key(d).startswith(f"{prefix}-")
    )


def find(name: str) -> Distribution | None:
    """The distribution of a name, or None."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _key(d: Distribution) -> str:
    """The normalised name; empty for the folder of a half-removed distribution."""
    if not (d.read_text("METADATA") or d.read_text("PKG-INFO")) or "Name" not in d.metadata:
        return ""
    return re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower()
