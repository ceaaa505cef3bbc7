"""What is made once is made once, whole, and by one of those who ask for it."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from trimtab.core.cache import made_once
from trimtab.core.errors import BadInput


def test_of_many_who_ask_at_once_one_makes_it(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(path: Path) -> None:
        made.append(path)
        path.mkdir()
        time.sleep(0.05)
        (path / "weights").write_text("whole")

    def ask(_: int) -> str:
        return (made_once(tmp_path / "cache" / "model", "the model", make) / "weights").read_text()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == ["whole"] * 8
    assert len(made) == 1


def test_what_fails_half_way_leaves_nothing_and_is_made_by_the_next(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        made_once(tmp_path / "file", "the file", fail)
    assert os.listdir(tmp_path) == ["file.lock"]
    path = made_once(tmp_path / "file", "the file", lambda path: path.write_text("whole") and None)
    assert path.read_text() == "whole"


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(BadInput, match=r"the file cannot be written .*TRIMTAB_CACHE"):
        made_once(tmp_path / "cache" / "file", "the file", Path.touch)
