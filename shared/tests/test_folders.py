"""Folders of files: all are there or none, whatever comes between."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from trimtab.core.errors import BadInput
from trimtab.core.folders import write_folder

FILES = {"a": "new a", "b.sh": "#!/bin/sh\nexit 7\n"}


class Interrupted(Mapping[str, str]):
    """Files of which the second is asked for when something happens."""

    def __init__(self, happening: Callable[[], None]) -> None:
        self._happening = happening

    def __getitem__(self, name: str) -> str:
        if name != "a":
            self._happening()
        return FILES[name]

    def __iter__(self) -> Iterator[str]:
        return iter(FILES)

    def __len__(self) -> int:
        return len(FILES)


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def breaks() -> None:
    raise OSError(28, "No space left on device")


def test_a_new_folder_below_new_ones(tmp_path: Path) -> None:
    write_folder(tmp_path / "x" / "y", FILES)
    assert content(tmp_path / "x" / "y") == FILES
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["y"]
    assert os.access(tmp_path / "x" / "y" / "b.sh", os.X_OK)
    assert not os.access(tmp_path / "x" / "y" / "a", os.X_OK)
    assert (tmp_path / "x" / "y").stat().st_mode == (tmp_path / "x").stat().st_mode


def test_a_folder_that_is_there_keeps_what_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old a")
    (tmp_path / "mine").write_text("kept")
    write_folder(tmp_path, FILES)
    assert content(tmp_path) == {**FILES, "mine": "kept"}


@pytest.mark.parametrize("there", [False, True])
def test_a_failure_leaves_everything_as_it_was(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "job"
    if there:
        folder.mkdir()
        (folder / "a").write_text("old a")
    with pytest.raises(BadInput, match=r"job: the folder cannot be written \(No space left"):
        write_folder(folder, Interrupted(breaks))
    assert [path.name for path in tmp_path.iterdir()] == (["job"] if there else [])
    assert not there or content(folder) == {"a": "old a"}


@pytest.mark.parametrize("there", [False, True])
def test_a_signal_waits_until_all_is_written(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "job"
    if there:
        folder.mkdir()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        write_folder(folder, Interrupted(lambda: os.kill(os.getpid(), signal.SIGINT)))
    assert content(folder) == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["job"]
    assert signal.getsignal(signal.SIGINT) is before


def test_what_cannot_be_a_folder_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match="file: the folder cannot be written"):
        write_folder(tmp_path / "file", FILES)
    (tmp_path / "job" / "b.sh").mkdir(parents=True)
    with pytest.raises(BadInput, match=r"b\.sh: this is a folder"):
        write_folder(tmp_path / "job", FILES)
    assert [path.name for path in (tmp_path / "job").iterdir()] == ["b.sh"]
