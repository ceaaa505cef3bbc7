"""The shape of the repository: its import arrows, its distributions, and what no file may say."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTIONS = sorted(
    project.parent
    for project in [*ROOT.glob("*/pyproject.toml"), *ROOT.glob("plugins/*/pyproject.toml")]
)

MACHINE_PATH = re.compile(r"(?<![\w./~-])/(?:home|Users|root|opt|work|mnt|tmp)/\w")


def tracked() -> list[Path]:
    """The text files under version control."""
    try:
        listed = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git checkout")
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def project(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    return content


def test_the_import_arrows_hold() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    checked = subprocess.run(
        [linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_plugin_stands_in_the_import_arrows() -> None:
    roots = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
        "root_packages"
    ]
    packages = [p for folder in DISTRIBUTIONS for p in (folder / "src" / "trimtab").iterdir()]
    names = {f"trimtab.{package.name}" for package in packages if package.is_dir()}
    assert names - {"trimtab.__pycache__"} == set(roots)


@pytest.mark.skipif(os.environ.get("TOX_ENV_NAME") != "unit", reason="only tox's unit environment")
@pytest.mark.parametrize("framework", ["torch", "vllm", "deepspeed", "transformers", "triton"])
def test_the_unit_tests_run_without_frameworks(framework: str) -> None:
    assert find_spec(framework) is None


def test_trimtab_is_a_namespace() -> None:
    assert not [*ROOT.glob("**/src/trimtab/__init__.py")]


@pytest.mark.parametrize("folder", DISTRIBUTIONS, ids=lambda folder: folder.name)
def test_a_distribution_is_whole(folder: Path) -> None:
    assert (folder / "README.md").read_text().startswith(f"# {project(folder)['name']}\n")
    packages = [p for p in (folder / "src" / "trimtab").iterdir() if (p / "__init__.py").exists()]
    assert packages
    assert [p.name for p in packages if not (p / "py.typed").exists()] == []


def test_all_distributions_share_one_version() -> None:
    versions = {project(folder)["version"] for folder in [*DISTRIBUTIONS, ROOT]}
    assert len(versions) == 1


def test_the_extras_name_every_plugin() -> None:
    extras = project(ROOT)["optional-dependencies"]
    for folder in ROOT.glob("plugins/*/pyproject.toml"):
        plugin = project(folder.parent)
        pin = f"{plugin['name']}=={plugin['version']}"
        assert pin in extras["all"]
        assert extras[plugin["name"].removeprefix("trimtab-")] == [pin]


def test_every_distribution_is_type_checked_and_tested_without_frameworks() -> None:
    checked = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["files"]
    installed = (ROOT / "tox.ini").read_text().splitlines()
    for folder in DISTRIBUTIONS:
        path = folder.relative_to(ROOT).as_posix()
        assert f"{path}/src" in checked
        assert f"    -e {path}" in installed


def test_the_lock_was_made_from_its_input() -> None:
    digest = hashlib.sha256((ROOT / "requirements" / "cpu.in").read_bytes()).hexdigest()
    assert digest in (ROOT / "requirements" / "cpu.lock").read_text(), "run python tools/lock.py"


def test_the_lock_has_the_cpu_build_of_torch_and_none_of_its_media_libraries() -> None:
    pins = (ROOT / "requirements" / "cpu.lock").read_text().splitlines()
    names = {pin.split("==")[0]: pin for pin in pins if not pin.startswith("#")}
    assert names["torch"].endswith("+cpu")
    assert not names.keys() & {"torchvision", "torchaudio", "torchcodec"}
    assert not [name for name in names if name.startswith("nvidia-")]


def test_no_file_names_a_path_of_one_machine() -> None:
    found = []
    for file in tracked():
        try:
            text = file.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{file.relative_to(ROOT)}: {hit[0]}" for hit in MACHINE_PATH.finditer(text)]
    assert found == []
