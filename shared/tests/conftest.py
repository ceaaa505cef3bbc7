"""Made-up distributions on the module path, and commands run in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import Distribution
from pathlib import Path
from textwrap import dedent

import pytest

from trimtab.core.hooks import discover

EntryPoints = Mapping[str, Mapping[str, str]]


@dataclass
class Site:
    """Folders on the module path that hold made-up distributions."""

    root: Path
    prepend: Callable[[str], None]
    folders: list[Path] = field(default_factory=list)

    def folder(self, name: str = "site") -> Path:
        """A folder on the module path."""
        folder = self.root / name
        if folder not in self.folders:
            folder.mkdir(parents=True)
            self.folders.append(folder)
            self.prepend(str(folder))
        return folder

    def add(
        self,
        name: str,
        version: str = "1.0",
        entry_points: EntryPoints | None = None,
        files: Mapping[str, str] | None = None,
        *,
        folder: str = "site",
        egg: bool = False,
    ) -> None:
        """Installs a distribution: its metadata, its entry points by group, and its modules."""
        place = self.folder(folder)
        stem = f"{name.replace('-', '_')}-{version}"
        info = place / (f"{stem}.egg-info" if egg else f"{stem}.dist-info")
        info.mkdir()
        header = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (info / ("PKG-INFO" if egg else "METADATA")).write_text(header)
        lines: list[str] = []
        for group, named in (entry_points or {}).items():
            lines += [f"[{group}]", *(f"{key} = {value}" for key, value in named.items())]
        (info / "entry_points.txt").write_text("\n".join(lines))
        for path, text in (files or {}).items():
            module = place / path
            module.parent.mkdir(parents=True, exist_ok=True)
            module.write_text(dedent(text))

    def trimtab(
        self, *arguments: str, stdout: int = subprocess.PIPE, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs the command in another process that sees these distributions too."""
        return subprocess.run(
            [sys.executable, "-m", "trimtab.cli", *arguments],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment(**environment),
            cwd=self.root,
            timeout=120,
            check=False,
        )

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of a process that sees these distributions."""
        modules = os.pathsep.join(map(str, reversed(self.folders)))
        return {**os.environ, "PYTHONPATH": modules, **more}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """Room for made-up distributions beside the ones that are installed."""
    discover.cache_clear()
    yield Site(tmp_path, monkeypatch.syspath_prepend)
    discover.cache_clear()


@pytest.fixture
def only(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """As `site`, and importlib.metadata sees none but the made-up distributions."""
    everywhere = Distribution.discover

    def discover_here(**about: object) -> Iterator[Distribution]:
        path = [str(folder) for folder in reversed(site.folders)]
        return iter(everywhere(**{**about, "path": path}))

    monkeypatch.setattr(Distribution, "discover", discover_here)
    return site
