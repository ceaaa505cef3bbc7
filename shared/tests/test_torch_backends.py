"""What ``import torch`` runs of trimtab, without torch: nothing that could break or slow it."""

from __future__ import annotations

import subprocess
import sys
import types
from importlib.metadata import entry_points

import pytest

from trimtab.hosts.torch import backends

GROUP = {"trimtab.torch_backends": {"sound": "sound_backend:create", "taken": "taken:create"}}


@pytest.fixture
def torch(monkeypatch):
    """A torch that remembers what is registered.

    It has the backend ``taken`` already, and those of the plugins that are installed here.
    """
    registered = {}
    installed = [found.name for found in entry_points(group=backends.GROUP)]

    def register_backend(name, create, extended_api, devices):
        if name == "unwanted":
            raise RuntimeError("no such thing")
        registered[name] = (create, extended_api, devices)

    torch, distributed = types.ModuleType("torch"), types.ModuleType("torch.distributed")
    distributed.is_available = lambda: True
    distributed.Backend = types.SimpleNamespace(
        backend_list=["gloo", "taken", *installed], register_backend=register_backend
    )
    torch.distributed, torch.registered = distributed, registered
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch.distributed", distributed)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    return torch


def test_backends_are_registered_by_name_and_loaded_by_use(site, torch):
    source = "def create(options, more): return ('made', options, more)"
    site.add("trimtab-sound", entry_points=GROUP, files={"sound_backend.py": source})
    backends.register()
    (name, (create, extended_api, devices)), *rest = torch.registered.items()
    assert (name, extended_api, devices, rest) == ("sound", True, ["cpu", "cuda"], [])
    assert "sound_backend" not in sys.modules
    assert create(1, 2) == ("made", 1, 2)


def test_one_that_fails_is_logged_and_leaves_the_others(site, torch, caplog):
    named = {"trimtab.torch_backends": {"unwanted": "x:y", "wanted": "gone:create"}}
    site.add("trimtab-both", entry_points=named)
    backends.register()
    assert list(torch.registered) == ["wanted"]
    (record,) = caplog.messages
    assert "the backend 'unwanted' is not registered (RuntimeError: no such thing)" in record


def test_a_torch_without_distributed(site, torch):
    site.add("trimtab-sound", entry_points=GROUP)
    torch.distributed.is_available = lambda: False
    backends.register()
    assert torch.registered == {}


def test_broken_metadata_is_logged(monkeypatch, caplog):
    def broken(**_):
        raise UnicodeDecodeError("utf-8", b"", 0, 1, "bad byte")

    monkeypatch.setattr(backends, "entry_points", broken)
    backends.register()
    assert "the plugins cannot be listed (UnicodeDecodeError" in caplog.text


def test_only_the_standard_library_is_imported():
    code = (
        "import sys; sys.modules['torch'] = None; before = set(sys.modules)\n"
        "from trimtab.hosts.torch.backends import register; register()\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "['trimtab']\n"
