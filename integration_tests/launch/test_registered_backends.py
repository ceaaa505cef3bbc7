"""Backends that plugins bring to a real torch.distributed, and what ``import torch`` does then."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from trimtab.hosts.torch import backends

pytestmark = pytest.mark.integration

CREATE = """
from torch import distributed

def create(options, more):
    return distributed.ProcessGroupGloo(
        options.store, options.group_rank, options.group_size, options.timeout
    )
"""

REDUCE = """
import sys, torch
from torch import distributed
assert "own_gloo" not in sys.modules
assert distributed.Backend.default_device_backend_map["cpu"] == "gloo"
store = distributed.HashStore()
distributed.init_process_group("tabbed", store=store, rank=0, world_size=1)
total = torch.ones(3)
distributed.all_reduce(total)
print(distributed.get_backend(), total.sum().item())
"""

LISTED = "from torch import distributed; print('tabbed' in distributed.Backend.backend_list)"


@pytest.fixture
def installed(tmp_path: Path):
    """Runs code where the backend ``tabbed`` is installed, with other entry points beside it."""

    def python(code: str, *flags: str, more: str = "", **environment: str):
        info = tmp_path / "trimtab_tabbed-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: trimtab-tabbed\nVersion: 1\n")
        entry_points = f"[trimtab.torch_backends]\ntabbed = own_gloo:create\n{more}"
        (info / "entry_points.txt").write_text(entry_points)
        (tmp_path / "own_gloo.py").write_text(CREATE)
        return subprocess.run(
            [sys.executable, *flags, "-c", code],
            env={**os.environ, "PYTHONPATH": str(tmp_path), **environment},
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )

    return python


def test_a_backend_is_there_by_name_and_loads_when_used(installed):
    done = installed(REDUCE)
    assert (done.returncode, done.stdout) == (0, "tabbed 3.0\n"), done.stderr


def test_broken_plugins_leave_import_torch_alone(installed):
    broken = "lost = nowhere:create\n[trimtab.plugins]\nrude = rude_plugin\n"
    done = installed(LISTED, more=broken)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_autoload_can_be_switched_off(installed):
    done = installed(LISTED, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_only_the_backends_of_plugins_are_registered_and_no_plugin_is_imported():
    code = (
        "import sys; from torch import distributed\n"
        "loaded = {tuple(n.split('.')[:2]) for n in sys.modules if n.startswith('trimtab.')}\n"
        "print(sorted(distributed.Backend._plugins), sorted(loaded))"
    )

    def shown(autoload: str) -> str:
        environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload}
        return subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        ).stdout

    names = sorted(found.name.upper() for found in entry_points(group=backends.GROUP))
    assert shown("0") == "[] []\n"
    assert shown("1") == f"{names} [('trimtab', 'hosts')]\n"
