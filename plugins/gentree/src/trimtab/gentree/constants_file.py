"""Reading the constants of GenModel from a file."""

from __future__ import annotations

from pathlib import Path

from trimtab.core.cost import Constants
from trimtab.core.documents import read_json, read_yaml


def read_constants(path: str | Path) -> Constants:
    """Reads constants from a YAML or JSON file.

    Raises:
        BadInput: it names the file, the key, the value and what would be right.
    """
    if Path(path).suffix == ".json":
        return read_json(path, Constants)
    return read_yaml(path, Constants)
