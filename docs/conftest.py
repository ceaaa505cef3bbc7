"""Collects the pages as tests: their ``python`` and ``console`` blocks run, in the page's order.

A page whose head says ``frameworks: true`` runs with the integration tests.
"""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

_SNIPPET = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FRAMEWORKS = re.compile(r"\A---\n.*^frameworks: true$.*?^---$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, and the line its code begins on."""

    language: str
    code: str
    line: int


def page_text(path: Path) -> str:
    """A page with its snippets put in."""
    return _SNIPPET.sub(lambda found: (ROOT / found[1]).read_text(), path.read_text())


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a page that run."""
    for found in _BLOCK.finditer(text):
        if found[1] in ("python", "console"):
            yield Block(found[1], found[2], text.count("\n", 0, found.start(2)) + 1)


def run_console(block: Block, folder: Path) -> None:
    """Runs the lines after ``$`` and compares their output; ``...`` stands for anything."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COLUMNS": "100", "NO_COLOR": "1"}
    for part in re.split(r"^\$ ", block.code, flags=re.MULTILINE)[1:]:
        command, _, expected = part.partition("\n")
        ran = subprocess.run(
            ["bash", "-c", command],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        same = doctest.OutputChecker().check_output(expected, ran.stdout, options)
        assert same, f"{command!r} (status {ran.returncode}) printed:\n{ran.stdout}"


class PageTest(pytest.Item):
    """The blocks of one page, which share their names and their folder."""

    def runtest(self) -> None:
        """Runs them."""
        names: dict[str, Any] = {"__name__": "__main__"}
        with TemporaryDirectory() as folder:
            for block in blocks(page_text(self.path)):
                if block.language == "python":
                    code = "\n" * (block.line - 1) + block.code
                    exec(compile(code, str(self.path), "exec"), names)
                else:
                    run_console(block, Path(folder))

    def reportinfo(self) -> tuple[Path, int, str]:
        """Names the page in reports."""
        return self.path, 0, self.path.name


class PageFile(pytest.File):
    """A page with at least one block that runs."""

    def collect(self) -> Iterator[PageTest]:
        """The page as one test."""
        text = page_text(self.path)
        if any(blocks(text)):
            page: PageTest = PageTest.from_parent(self, name="blocks")
            if _FRAMEWORKS.match(text):
                page.add_marker(pytest.mark.integration)
            yield page


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> PageFile | None:
    """Collects the pages of this folder."""
    if file_path.suffix == ".md":
        page: PageFile = PageFile.from_parent(parent, path=file_path)
        return page
    return None
